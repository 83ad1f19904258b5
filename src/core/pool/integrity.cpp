// The conservation laws of a pool, recomputed from its parts (promise 13).

#include <string>

#include "pool/pool.hpp"

namespace elastickv {
namespace {

Status broken(const std::string &text) { return {Code::integrity, "integrity: " + text}; }

}  // namespace

Status Pool::check_blocks() const {
    std::uint32_t free = 0, used = 0, cached = 0, withheld = 0, doomed = 0, coming = 0;
    for (std::uint32_t block = 0; block < options_.num_blocks; ++block) {
        std::uint32_t missing = 0, unready = 0;
        for (std::uint32_t page = first_page(block); page <= last_page(block); ++page) {
            const bool absent = absent_pages_.contains(page);
            const Stage stage = absent ? Stage::none : extents_[head_of_[page]].stage;
            const bool ordered = stage == Stage::mapping || stage == Stage::recalling || stage == Stage::mapped;
            missing += ordered ? 0 : 1;
            unready += stage == Stage::mapped ? 0 : 1;
        }
        const std::string name = "block " + std::to_string(block);
        if (missing != missing_[block] || unready != unready_[block]) return broken(name + " counts its pages wrongly");
        const BlockState state = state_[block];
        if ((state == BlockState::absent) != (unready != 0)) return broken(name + " is handed out without its pages");
        const bool is_free = state == BlockState::free || state == BlockState::withheld;
        const bool held_back = state == BlockState::withheld || state == BlockState::doomed;
        if ((is_free || is_cached(block)) && on_draining(block) != held_back)
            return broken(name + " and the extents that are drained");
        if (free_blocks_.contains(block) != (state == BlockState::free)) return broken(name + " and the free set");
        if (lru_.contains(block) != (state == BlockState::cached)) return broken(name + " and the cached list");
        if (missing == 0 && unready != 0 && block != 0) ++coming;
        if (block == 0) continue;
        free += state == BlockState::free ? 1 : 0;
        used += state == BlockState::used ? 1 : 0;
        cached += state == BlockState::cached ? 1 : 0;
        withheld += state == BlockState::withheld ? 1 : 0;
        doomed += state == BlockState::doomed ? 1 : 0;
    }
    if (coming != coming_) return broken("blocks on their way: " + std::to_string(coming_));
    if (free != free_blocks_.count() || cached != lru_.count() || used != used_blocks_.load() ||
        withheld != withheld_ || doomed != doomed_)
        return broken("block counts");
    if (available_.load() != free + cached)
        return broken("available is " + std::to_string(available_.load()) + ", free + cached is " +
                      std::to_string(free + cached));
    return {};
}

Status Pool::check_extents() const {
    PageUsage pages;
    std::uint64_t held = 0, covered = 0, draining = 0;
    for (std::uint64_t head = heads_.first(); head != Bitmap::npos; head = heads_.first_from(head + 1)) {
        const Extent &extent = extents_[head];
        std::uint32_t used = 0, cached = 0;
        const auto first = static_cast<std::uint32_t>(head);
        for (std::uint32_t block = first_block(first); block <= last_block(first + extent.pages - 1); ++block) {
            used += state_[block] == BlockState::used ? 1 : 0;
            cached += is_cached(block) ? 1 : 0;
        }
        if (used != extent.used || cached != extent.cached)
            return broken("the extent at page " + std::to_string(head) + " counts its blocks wrongly");
        const bool mapped = extent.stage == Stage::mapped;
        if ((used != 0 || cached != 0) && !mapped)
            return broken("the extent at page " + std::to_string(head) + " is leaving with blocks on it");
        if (empty_extents_.contains(head) != (mapped && used == 0 && cached == 0))
            return broken("the extent at page " + std::to_string(head) + " and the set of empty extents");
        const bool evictable = mapped && used == 0 && cached != 0;
        if (evictable_.contains(first) != evictable || (evictable && extent.thin != thinness(extent)))
            return broken("the extent at page " + std::to_string(head) + " and the order of eviction");
        covered += extent.pages;
        if (extent.stage == Stage::unmapping) pages.leaving += extent.pages;
        if (draining_.contains(head)) draining += mapped ? extent.pages : num_pages_ + 1;
        if (mapped || extent.stage == Stage::mapping || extent.stage == Stage::recalling) held += extent.pages;
        if (extent.stage == Stage::lost || used != 0)
            pages.used += extent.pages;
        else if (!mapped)
            pages.transit += extent.pages;
        else
            (cached != 0 ? pages.cached : pages.free) += extent.pages;
    }
    if (held != held_pages_) return broken("held pages: " + std::to_string(held_pages_));
    if (pages.used != usage_.used || pages.cached != usage_.cached || pages.free != usage_.free ||
        pages.transit != usage_.transit || pages.leaving != usage_.leaving || draining != draining_pages_)
        return broken("pages are not free + used + cached + in transit");
    if (covered + absent_pages_.count() != num_pages_) return broken("pages are neither absent nor in an extent");
    return {};
}

// Whether a rank has answered that pages are gone and has not given their lease back yet: it answers first.
bool Pool::lease_in_flight() const noexcept {
    for (std::uint32_t rank = 0; rank < table_->ranks(); ++rank)
        if (table_->rank(rank).giving.load(std::memory_order_acquire) != 0) return true;
    return false;
}

Status Pool::check_integrity() {
    if (origin_.elsewhere()) return not_ours();
    const std::scoped_lock lock(mutex_);
    poll_locked();
    publish();
    if (Status status = check_blocks(); !status.ok()) return status;
    if (Status status = check_extents(); !status.ok()) return status;
    if (!transit_.empty() || lease_in_flight()) return {};  // not a quiet point for the leases
    for (const auto &share : leases_.shares()) {
        const std::uint64_t expected = (held_pages_ + lost_pages_) * share.page_cost;
        if (share.tenant->leased() != expected)
            return broken("the ledger says " + std::to_string(share.tenant->leased()) + " bytes are leased, " +
                          std::to_string(expected) + " are held");
    }
    return {};
}

PoolStats Pool::stats() {
    if (origin_.elsewhere()) return {};
    const std::scoped_lock lock(mutex_);
    poll_locked();
    PoolStats out;
    out.num_blocks = options_.num_blocks;
    out.free = static_cast<std::uint32_t>(free_blocks_.count());
    out.used = used_blocks_.load();
    out.cached = lru_.count() + doomed_;
    out.withheld = withheld_;
    out.coming = coming_;
    out.pages = usage_;
    out.extents = heads_.count();
    out.lost_pages = lost_pages_;
    out.tickets = ticket();
    out.map_failures = map_failures_;
    out.grown_extents = grown_;
    out.returned_extents = returned_;
    out.recalled_extents = recalled_;
    out.counters = counters_;
    return out;
}

}  // namespace elastickv
