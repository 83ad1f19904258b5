#include "gil.hpp"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace elastickv::py {
namespace {

constexpr auto kLastOnes = std::chrono::seconds(1);  // for threads that wait for the GIL when the interpreter ends

std::atomic<bool> ending{false};
std::atomic<int> returning{0};  // threads between their look at `ending` and having the GIL
pthread_t finalizer;            // the thread that ends the interpreter; valid once `ending` is true

// Once this returns no thread of ours asks for the GIL any more, but this one.
void end() {
    finalizer = pthread_self();
    ending.store(true);
    const Unlocked unlocked;
    const auto deadline = std::chrono::steady_clock::now() + kLastOnes;
    while (returning.load() > 0 && std::chrono::steady_clock::now() < deadline)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

}  // namespace

Unlocked::Unlocked() noexcept { release(); }

Unlocked::~Unlocked() { take(); }

void Unlocked::take() noexcept {
    returning.fetch_add(1);
    if (ending.load() && pthread_equal(finalizer, pthread_self()) == 0) {
        returning.fetch_sub(1);
        for (;;) ::pause();  // until the process has ended
    }
    PyEval_RestoreThread(state_);
    returning.fetch_sub(1);
}

void Unlocked::release() noexcept { state_ = PyEval_SaveThread(); }

void watch_interpreter(nanobind::module_ &module) {
    // Threads that waited for the GIL in the parent are not in the child.
    pthread_atfork(nullptr, nullptr, [] { returning.store(0); });
    module.def("_end", &end, "Python's exit handler.");
    nanobind::module_::import_("atexit").attr("register")(module.attr("_end"));
}

}  // namespace elastickv::py
