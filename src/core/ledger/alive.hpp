// Who lives: locks of open file descriptions on single bytes of the "alive" file.
//
// Member m of the tenant in slot t holds a write lock on byte t*64+m, each through a descriptor of its own. The kernel
// drops the lock when the last descriptor is closed, however its process ends. Questions go through another
// descriptor, because a description is never in conflict with its own locks.
#pragma once

#include "base/status.hpp"
#include "ledger/ledger.hpp"

namespace elastickv::ledger {

// Locks one byte; exists when another description holds it.
Status lock_byte(int fd, std::uint64_t offset) noexcept;
// Drops the lock for every copy of the descriptor, those of children that are about to exec too.
void unlock_byte(int fd, std::uint64_t offset) noexcept;
// Is any byte of [offset, offset+length) locked by another description? True also when the kernel cannot say: then
// nothing is taken from a tenant that may live.
bool locked_by_other(int fd, std::uint64_t offset, std::uint64_t length) noexcept;

inline std::uint64_t alive_byte(int slot, int member) noexcept {
    return static_cast<std::uint64_t>(slot) * kMaxMembers + static_cast<std::uint64_t>(member);
}
inline bool slot_alive(int fd, int slot) noexcept { return locked_by_other(fd, alive_byte(slot, 0), kMaxMembers); }
inline bool member_alive(int fd, int slot, int member) noexcept {
    return locked_by_other(fd, alive_byte(slot, member), 1);
}

}  // namespace elastickv::ledger
