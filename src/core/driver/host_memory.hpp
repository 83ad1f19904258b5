// How much memory this machine has, for this process. Bytes. Thread-safe.
#pragma once

#include <cstdint>

namespace elastickv {

// The machine's RAM, or the control group's limit where that is lower.
std::uint64_t physical_host_bytes();

// What could be allocated now without an out-of-memory kill, as far as the kernel tells. `enough`: an answer of this
// many bytes needs no exact figure (then a single cheap call may do).
std::uint64_t available_host_bytes(std::uint64_t enough);

// Whether the kernel gives huge pages to memory files whose mappings ask for them; an administrator's setting, off by
// default (/sys/kernel/mm/transparent_hugepage/shmem_enabled).
bool huge_memory_files();

// How many ranges all host drivers of a process may have mapped at once. The kernel limits the mappings of a process
// (vm.max_map_count), and at that limit not even unmapping works. A mapped range costs two at worst, one for itself and
// one for the gap beside it; one sixteenth is left for everything else in the process.
std::uint64_t mapped_ranges_limit();

}  // namespace elastickv
