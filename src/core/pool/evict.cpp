// Which extents lose their cached blocks when the memory must go: those that hold little for their size first.
//
// A cached block keeps its whole extent mapped. So what is lost is weighed against what is gained: extents are sorted
// into classes by how thinly they are filled with cached blocks, each class half as full as the one before, and the
// thinnest class goes first, least recently used first within a class. All extents that are at least half full are one
// class, so an ordinary cache is evicted by age alone. Moving an extent between classes is O(1), and so is finding the
// next one to go: nothing is sorted.

#include <algorithm>
#include <bit>

#include "base/faultpoint.hpp"
#include "pool/pool.hpp"

namespace elastickv {
namespace {

constexpr std::uint32_t kLookAt = 64;  // extents of a class that may be too large to go before the class is given up

}  // namespace

// 0: at least half full of cached blocks, 1: a quarter, and so on.
std::uint32_t Pool::thinness(const Extent &extent) const noexcept {
    const std::uint64_t data = extent.cached * options_.block_bytes;
    const std::uint64_t times = std::max<std::uint64_t>(1, extent.pages * options_.page_bytes / data);
    return std::min(kThinnessClasses, static_cast<std::uint32_t>(std::bit_width(times))) - 1;
}

// Puts an extent where it belongs: among the empty ones, among those that eviction would empty, or in neither.
void Pool::reclass(std::uint32_t head) noexcept {
    Extent &extent = extents_[head];
    const bool unused = extent.stage == Stage::mapped && extent.used == 0;
    if (unused && extent.cached == 0)
        empty_extents_.insert(head);
    else
        empty_extents_.erase(head);
    const bool was = evictable_.contains(head);
    if (!unused || extent.cached == 0) {
        if (was) evictable_.remove(head);
        return;
    }
    const std::uint32_t thin = thinness(extent);
    if (was && thin == extent.thin) return;
    extent.thin = static_cast<std::uint8_t>(thin);
    if (was) {  // some of its blocks were forgotten; the others are no younger for that
        evictable_.remove(head);
        evictable_.push_oldest(head, thin);
    } else {
        evictable_.push_newest(head, thin);
    }
}

// The extent to empty next that leaves at least `keep` pages held, or npos.
std::uint32_t Pool::next_to_empty(std::uint64_t keep) const noexcept {
    if (held_pages_ <= keep) return Lru::npos;
    for (std::uint32_t thin = kThinnessClasses; thin-- > 0;) {
        std::uint32_t head = evictable_.oldest(thin);
        for (std::uint32_t looked = 0; head != Lru::npos && looked < kLookAt; ++looked) {
            if (held_pages_ >= keep + extents_[head].pages) return head;
            head = evictable_.after(head);
        }
    }
    return Lru::npos;
}

void Pool::empty_extent(std::uint32_t head, std::vector<std::uint32_t> &evicted) {
    const std::uint32_t last = last_block(head + extents_[head].pages - 1);
    for (std::uint32_t block = first_block(head); block <= last; ++block) {
        if (!is_cached(block)) continue;
        set_state(block, BlockState::free);
        evicted.push_back(block);
    }
}

bool Pool::over_cache_limit() const noexcept {
    const std::uint64_t limit = options_.cache_limit_pages;
    return limit == 0 ? own_cache() != 0 : usage_now().cached > limit;
}

// Brings the prefix cache under its own budget. The pages stay, mapped and free, as after any other free. A budget of 0
// also drops what is cached beside used blocks.
void Pool::keep_cache_limit(std::vector<std::uint32_t> &evicted) {
    const std::size_t before = evicted.size();
    while (lru_.count() != 0 && over_cache_limit()) {
        const std::uint32_t head = next_to_empty(0);
        if (head != Lru::npos) {
            empty_extent(head, evicted);
        } else {
            evicted.push_back(lru_.oldest());
            set_state(evicted.back(), BlockState::free);
        }
    }
    counters_.evicted_budget += evicted.size() - before;
}

// Evicts every cached block of extents that hold nothing else, and orders these unmapped.
std::uint64_t Pool::evict_extents(std::uint64_t pages, std::uint64_t keep, std::uint64_t ticket,
                                  std::vector<std::uint32_t> &evicted) {
    std::uint64_t given = 0;
    while (given < pages) {
        const std::uint32_t head = next_to_empty(keep);
        if (head == Lru::npos) break;
        const std::uint64_t empty = empty_extents_.count();
        empty_extent(head, evicted);
        (void)fault::point("pool.evict.cleared");
        order_unmap(head, true, ticket);
        given += extents_[head].pages;
        // A block that lies on several extents may have been the last one on another.
        if (given < pages && empty_extents_.count() > empty) given += give_free(pages - given, keep, ticket);
    }
    return given;
}

}  // namespace elastickv
