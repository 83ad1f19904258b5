// What the kernel says of a process's host memory files; read from /proc.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace elastickv::contract {

// Bytes behind all memory files named "elastickv" that a process has open (0: this one). Fails the test when
// unreadable.
std::uint64_t memfd_bytes(pid_t pid = 0);
// How many of them it has open.
int memfd_count(pid_t pid = 0);

struct Smaps {
    std::uint64_t size = 0;  // bytes of addresses mapped to such files
    std::uint64_t rss = 0;   // of them, resident in the page tables
};
Smaps memfd_smaps(pid_t pid = 0);

}  // namespace elastickv::contract
