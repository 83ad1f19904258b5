// What a forked child may not use: threads do not come along with a fork, locks may be held in it for ever, and shared
// tables still belong to the parent.
#pragma once

#include <cstdint>

namespace elastickv {

// Grows by one in every forked child: what was made under another epoch belongs to an ancestor.
std::uint64_t fork_epoch() noexcept;

// Remembers the process that an object was made in.
class Origin {
  public:
    // In a forked child of that process: the object must be left alone. One relaxed load.
    bool elsewhere() const noexcept { return epoch_ != fork_epoch(); }

  private:
    std::uint64_t epoch_ = fork_epoch();
};

}  // namespace elastickv
