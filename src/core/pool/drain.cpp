// Emptying extents that are in use, for neighbours who wait or a lowered limit.
//
// An extent can go only when nothing on it is used, and a busy engine reuses every block that becomes free, so a large
// extent might never be empty. While pages in use are asked back, as they become free, some extents are therefore
// *drained*: their free and cached blocks are withheld from the engine, until nothing on them is used and they go, or
// until nothing has been asked for a while. No request is stopped for it.

#include <algorithm>

#include "base/futex.hpp"
#include "pool/pool.hpp"

namespace elastickv {
namespace {

constexpr std::uint64_t kAhead = 4;  // a drain lasts as long as the requests on it, and more is asked meanwhile
// Who waits is granted a part, and asks for the next a moment later: what is asked swings, down to nothing and back. An
// extent that was handed out again in between would be pinned anew, and no drain would end.
constexpr std::uint64_t kKeepNs = 100'000'000;  // as long as the ledger keeps a demand that is not renewed

}  // namespace

bool Pool::on_draining(std::uint32_t block) const noexcept {
    if (draining_.count() == 0) return false;
    const std::uint32_t last = last_page(block);
    for (std::uint32_t page = first_page(block); page <= last; page = head_of_[page] + extents_[head_of_[page]].pages)
        if (draining_.contains(head_of_[page])) return true;
    return false;
}

// Sorts the free and cached blocks of an extent anew into those that are handed out and those that are not.
void Pool::set_draining(std::uint32_t head, bool draining) noexcept {
    if (!(draining ? draining_.insert(head) : draining_.erase(head))) return;
    const std::uint32_t pages = extents_[head].pages;
    draining_pages_ = draining ? draining_pages_ + pages : draining_pages_ - pages;
    drains_.store(draining_.count() != 0, std::memory_order_relaxed);
    for (std::uint32_t block = first_block(head); block <= last_block(head + pages - 1); ++block)
        if (state_[block] == BlockState::free || state_[block] == BlockState::withheld)
            set_state(block, BlockState::free);
        else if (is_cached(block))
            set_state(block, BlockState::cached);
}

// Has enough pages for `pages` on their way to being empty: the highest extents first, and first those less than half
// full of used blocks. What they cache goes at once, for a cached block may be wanted again and keep them.
void Pool::drain(std::uint64_t pages, std::vector<std::uint32_t> &evicted) {
    pages = std::min(kAhead * pages, std::max(pages, held_pages_ / 4));
    const std::uint64_t now = monotonic_ns();
    if (pages >= drain_peak_ || now >= drain_peak_until_ns_) {
        drain_peak_ = pages;
        drain_peak_until_ns_ = now + kKeepNs;
    }
    while (draining_.count() != 0) {
        const auto lowest = static_cast<std::uint32_t>(draining_.first());
        if (draining_pages_ < drain_peak_ + extents_[lowest].pages) break;
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

// No request that runs is stopped for a neighbour: its next block may be one that was withheld.
void Pool::stop_draining(std::uint32_t blocks) noexcept {
    while (free_blocks_.count() < blocks && withheld_ != 0 && draining_.count() != 0)
        set_draining(static_cast<std::uint32_t>(draining_.first()), false);
}

}  // namespace elastickv
