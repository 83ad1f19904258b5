// Descriptors that a forked child must not keep.
//
// A lock of an open file description lives as long as any process holds a copy of its descriptor. A child made by
// fork() has one, so it would keep its dead parent's tenant alive. Every descriptor that carries a lock is therefore
// registered here and closed in the child before fork() returns there (pthread_atfork). exec closes them anyway.
#pragma once

#include <cstdint>

#include "base/origin.hpp"

namespace elastickv::ledger {

std::uint64_t own_pid() noexcept;  // cached; right after fork()

// Owns a descriptor that only this process may hold. Not movable: the registry points at it.
class GuardedFd {
  public:
    explicit GuardedFd(int fd) noexcept;
    ~GuardedFd();
    GuardedFd(const GuardedFd &) = delete;
    GuardedFd &operator=(const GuardedFd &) = delete;

    int get() const noexcept { return fd_; }  // -1 in a forked child
    void close() noexcept;

  private:
    friend struct Registry;
    int fd_;
    GuardedFd *next_ = nullptr;
    GuardedFd *previous_ = nullptr;
};

}  // namespace elastickv::ledger
