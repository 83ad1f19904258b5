// Emptying extents that are in use, for neighbours who wait or a lowered limit.
//
// An extent can go only when nothing on it is used, and a busy engine reuses every block that becomes free, so a large
// extent might never be empty. While pages in use are asked back, as they become free, some extents are therefore
// *drained*: their free blocks are withheld from the engine, until nothing on them is used and they go, or until
// nothing is asked any more. No request is stopped for it.

#include <algorithm>

#include "pool/pool.hpp"

namespace elastickv {
namespace {

constexpr std::uint64_t kAhead = 4;  // a drain lasts as long as the requests on it, and more is asked meanwhile

}  // namespace

bool Pool::on_draining(std::uint32_t block) const noexcept {
    if (draining_.count() == 0) return false;
    const std::uint32_t last = last_page(block);
    for (std::uint32_t page = first_page(block); page <= last; page = head_of_[page] + extents_[head_of_[page]].pages)
        if (draining_.contains(head_of_[page])) return true;
    return false;
}

// Sorts the free blocks of an extent anew into those that are handed out and those that are withheld.
void Pool::set_draining(std::uint32_t head, bool draining) noexcept {
    if (!(draining ? draining_.insert(head) : draining_.erase(head))) return;
    const std::uint32_t pages = extents_[head].pages;
    draining_pages_ = draining ? draining_pages_ + pages : draining_pages_ - pages;
    drains_.store(draining_.count() != 0, std::memory_order_relaxed);
    for (std::uint32_t block = first_block(head); block <= last_block(head + pages - 1); ++block)
        if (state_[block] == BlockState::free || state_[block] == BlockState::withheld)
            set_state(block, BlockState::free);
}

// Has enough pages for `pages` on their way to being empty: the highest extents first, and first those less than half
// full of used blocks. What they cache goes at once, for a cached block may be wanted again and keep them.
void Pool::drain(std::uint64_t pages, std::vector<std::uint32_t> &evicted) {
    pages = std::min(kAhead * pages, std::max(pages, held_pages_ / 4));
    while (draining_.count() != 0) {
        const auto lowest = static_cast<std::uint32_t>(draining_.first());
        if (draining_pages_ < pages + extents_[lowest].pages) break;
        set_draining(lowest, false);
    }
    for (const bool any : {false, true}) {
        for (std::uint64_t head = heads_.last(); head != Bitmap::npos && draining_pages_ < pages;
             head = heads_.last_before(head)) {
            const Extent &extent = extents_[head];
            const std::uint64_t bytes = extent.pages * options_.page_bytes;
            // Block 0 stays for ever, and an extent of one block has nothing to withhold.
            if (head == 0 || extent.stage != Stage::mapped || extent.used == 0 || bytes <= options_.block_bytes)
                continue;
            if (any || extent.used * options_.block_bytes * 2 < bytes)
                set_draining(static_cast<std::uint32_t>(head), true);
        }
    }
    for (std::uint64_t head = draining_.first(); head != Bitmap::npos; head = draining_.first_from(head + 1)) {
        const std::size_t before = evicted.size();
        if (extents_[head].cached != 0) empty_extent(static_cast<std::uint32_t>(head), evicted);
        counters_.evicted_neighbour += evicted.size() - before;
    }
}

}  // namespace elastickv
