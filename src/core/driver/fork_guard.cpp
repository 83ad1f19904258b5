#include "driver/fork_guard.hpp"

#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace elastickv {

namespace {

struct Watched {
    std::mutex mutex;
    std::vector<ForkAware *> drivers;
};

// Never destroyed: a fork may happen while the process is exiting.
Watched &watched() {
    static auto *all = new Watched;
    return *all;
}

void before() {
    watched().mutex.lock();
    for (ForkAware *driver : watched().drivers) driver->before_fork();
}
void in_parent() {
    for (ForkAware *driver : watched().drivers) driver->after_fork_in_parent();
    watched().mutex.unlock();
}
void in_child() {
    for (ForkAware *driver : watched().drivers) driver->after_fork_in_child();
    watched().mutex.unlock();
}

}  // namespace

void ForkAware::watch_forks() {
    static const int installed = pthread_atfork(before, in_parent, in_child);
    // pthread_atfork fails only for want of memory, as the line below would.
    if (installed != 0) throw std::bad_alloc();
    std::lock_guard guard(watched().mutex);
    watched().drivers.push_back(this);
}

void ForkAware::ignore_forks() noexcept {
    std::lock_guard guard(watched().mutex);
    std::erase(watched().drivers, this);
}

}  // namespace elastickv
