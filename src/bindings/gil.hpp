// C++ that runs with the GIL released, in threads that the interpreter may leave behind when it ends.
#pragma once

#include <nanobind/nanobind.h>

#include <utility>

namespace elastickv::py {

// Releases the GIL for as long as it lives. A thread that wants the GIL back while the interpreter ends is stopped for
// good: CPython before 3.14 would unwind it through C++ that cannot be unwound, and so abort the process.
class Unlocked {
  public:
    Unlocked() noexcept;
    ~Unlocked();
    Unlocked(const Unlocked &) = delete;
    Unlocked &operator=(const Unlocked &) = delete;

    // Runs `work` with the GIL held.
    template <class F> auto locked(F &&work) {
        take();
        auto result = std::forward<F>(work)();
        release();
        return result;
    }

  private:
    void take() noexcept;
    void release() noexcept;

    PyThreadState *state_ = nullptr;
};

// Lets Python say when it ends. Called once, by the module.
void watch_interpreter(nanobind::module_ &module);

}  // namespace elastickv::py
