#include "ledger/forkguard.hpp"

#include <pthread.h>
#include <unistd.h>

#include <atomic>

namespace elastickv::ledger {

namespace {
pthread_mutex_t registry_mutex = PTHREAD_MUTEX_INITIALIZER;  // held over list operations only, and by fork()
std::atomic<std::uint64_t> pid{0};
}  // namespace

struct Registry {
    static GuardedFd *first;

    static void add(GuardedFd *fd) noexcept {
        fd->next_ = first;
        if (first != nullptr) first->previous_ = fd;
        first = fd;
    }
    static void remove(GuardedFd *fd) noexcept {
        if (fd->previous_ != nullptr) fd->previous_->next_ = fd->next_;
        if (fd->next_ != nullptr) fd->next_->previous_ = fd->previous_;
        if (first == fd) first = fd->next_;
        fd->next_ = fd->previous_ = nullptr;
    }
    static void before_fork() noexcept { pthread_mutex_lock(&registry_mutex); }
    static void after_fork_parent() noexcept { pthread_mutex_unlock(&registry_mutex); }
    static void after_fork_child() noexcept {
        while (first != nullptr) {
            GuardedFd *fd = first;
            ::close(fd->fd_);
            fd->fd_ = -1;
            remove(fd);
        }
        pid.store(0, std::memory_order_relaxed);
        pthread_mutex_unlock(&registry_mutex);
    }
    static void install() noexcept { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }
    static void install_once() noexcept {
        static pthread_once_t once = PTHREAD_ONCE_INIT;
        pthread_once(&once, install);
    }
};
GuardedFd *Registry::first = nullptr;

std::uint64_t own_pid() noexcept {
    std::uint64_t value = pid.load(std::memory_order_relaxed);
    if (value == 0) {
        Registry::install_once();
        value = static_cast<std::uint64_t>(getpid());
        pid.store(value, std::memory_order_relaxed);
    }
    return value;
}

GuardedFd::GuardedFd(int fd) noexcept : fd_(fd) {
    Registry::install_once();
    pthread_mutex_lock(&registry_mutex);
    if (fd_ >= 0) Registry::add(this);
    pthread_mutex_unlock(&registry_mutex);
}

GuardedFd::~GuardedFd() { close(); }

void GuardedFd::close() noexcept {
    pthread_mutex_lock(&registry_mutex);
    if (fd_ >= 0) {
        Registry::remove(this);
        ::close(fd_);
        fd_ = -1;
    }
    pthread_mutex_unlock(&registry_mutex);
}

}  // namespace elastickv::ledger
