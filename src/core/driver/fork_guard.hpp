// What a fork() does to drivers: the child owns nothing of them.
//
// Every driver is told before a fork (it takes its locks, so that nothing is half changed in the child), and after it
// in parent and child. In the child a driver drops what it holds at once, so memory never outlives the parent in a
// child.
#pragma once

namespace elastickv {

class ForkAware {
  public:
    ForkAware(const ForkAware &) = delete;
    ForkAware &operator=(const ForkAware &) = delete;

    virtual void before_fork() noexcept = 0;
    virtual void after_fork_in_parent() noexcept = 0;
    virtual void after_fork_in_child() noexcept = 0;

  protected:
    ForkAware() = default;
    virtual ~ForkAware() = default;

    // To be called by the most derived class at the end of its construction and the start of its destruction.
    void watch_forks();
    void ignore_forks() noexcept;
};

}  // namespace elastickv
