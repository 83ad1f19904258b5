// The host driver's physical memory: ranges of one memfd.
//
// take() really allocates, so running out is a status here and never a SIGBUS at an access later. give() punches a
// hole: the kernel has the pages back at once, whoever else still holds the file open, and the range reads as zero when
// it is taken again. Holes are reused smallest fit first, lowest offset among equals. Thread-safe; O(log n).
//
// With `huge`, and all sizes multiples of 2 MiB, the pages are huge ones where the kernel has them. It gives them to
// page faults in a mapping that asks for them, and never to fallocate(), so take() faults them in through a mapping of
// its own. 1 GiB taken and given back: 38 + 3 ms, against 230 + 120 ms, and another 250 + 80 ms to map and unmap, in
// pages of 4 KiB (one EPYC core, Linux 6.18; benchmarks/sharing/give_back.py).
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "base/status.hpp"

namespace elastickv {

class HostFile {
  public:
    HostFile() = default;
    ~HostFile();
    HostFile(const HostFile &) = delete;
    HostFile &operator=(const HostFile &) = delete;

    Status open(bool huge = false);
    int fd() const noexcept { return fd_; }

    Result<std::uint64_t> take(std::uint64_t bytes);  // an offset
    Status give(std::uint64_t offset, std::uint64_t bytes);

    void lock() const { mutex_.lock(); }
    void unlock() const { mutex_.unlock(); }
    void close_in_child() noexcept;  // requires lock()

  private:
    Result<std::uint64_t> take_offset(std::uint64_t bytes);
    void give_offset(std::uint64_t offset, std::uint64_t bytes);
    void add_hole(std::uint64_t offset, std::uint64_t bytes);
    void drop_hole(std::uint64_t offset, std::uint64_t bytes);
    int allocate(std::uint64_t offset, std::uint64_t bytes) const noexcept;  // errno, 0 when done
    void fault_in_huge(std::uint64_t offset, std::uint64_t bytes) const noexcept;
    int punch(std::uint64_t offset, std::uint64_t bytes) const noexcept;

    mutable std::mutex mutex_;
    int fd_ = -1;
    bool huge_ = false;
    std::uint64_t end_ = 0;                                      // everything from here on is free
    std::uint64_t size_ = 0;                                     // of the file, only ever grown
    std::map<std::uint64_t, std::uint64_t> by_offset_;           // holes: offset -> bytes
    std::set<std::pair<std::uint64_t, std::uint64_t>> by_size_;  // the same holes: (bytes, offset)
};

}  // namespace elastickv
