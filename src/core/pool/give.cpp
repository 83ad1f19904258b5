// How the pool gives back: empty extents first, the highest first; then extents that hold only cached blocks
// (evict.cpp).

#include <algorithm>

#include "base/faultpoint.hpp"
#include "base/futex.hpp"
#include "pool/pool.hpp"

namespace elastickv {
namespace {

constexpr std::uint64_t kLookUs = 250'000;           // an idle pool looks at its neighbours at least this often
constexpr std::uint64_t kOpenOrderUs = 10'000;       // while pages are to come back for a limit
constexpr std::uint64_t kMaintainPauseNs = 500'000;  // a pressed pool with nothing to give is not asked every step

}  // namespace

void Pool::order_unmap(std::uint32_t head, bool fenced, std::uint64_t ticket) {
    Extent &extent = extents_[head];
    const Run run{head, extent.pages};
    set_draining(head, false);
    extent.stage = Stage::unmapping;
    empty_extents_.erase(head);
    for (std::uint32_t block = first_block(head); block <= last_block(head + run.pages - 1); ++block) {
        const auto pages = static_cast<std::uint16_t>(pages_of_block_in(block, run));
        if (unready_[block] == 0) {
            free_blocks_.erase(block);
            count_block(state_[block], ~std::uint32_t{0});
            state_[block] = BlockState::absent;
        } else if (missing_[block] == 0) {
            --coming_;  // its other pages are on their way, this one is leaving
        }
        missing_[block] = static_cast<std::uint16_t>(missing_[block] + pages);
        unready_[block] = static_cast<std::uint16_t>(unready_[block] + pages);
    }
    held_pages_ -= run.pages;
    usage_.free -= run.pages;
    usage_.transit += run.pages;
    usage_.leaving += run.pages;
    transit_.push_back(head);
    table_->order(head, {++extent.generation, run.pages, false, fenced}, ticket);
    (void)fault::point("pool.unmap.ordered");
}

// Orders empty extents unmapped until `pages` are on their way, keeping at least `keep` pages held.
std::uint64_t Pool::give_free(std::uint64_t pages, std::uint64_t keep, std::uint64_t ticket) {
    std::uint64_t given = 0;
    std::uint64_t head = empty_extents_.last();
    while (given < pages && head != Bitmap::npos) {
        const std::uint64_t length = extents_[head].pages;
        if (held_pages_ >= keep + length) {
            order_unmap(static_cast<std::uint32_t>(head), true, ticket);
            given += length;
        }
        head = empty_extents_.last_before(head);
    }
    return given;
}

// A clock that is read in a few nanoseconds, right to a few milliseconds: block operations read it each time.
void Pool::mark_active() noexcept { last_active_ns_.store(coarse_ns(), std::memory_order_relaxed); }

void Pool::ordered(std::uint64_t given, std::uint64_t ticket, std::uint64_t now) noexcept {
    if (given != 0) {
        table_->header().ticket.store(ticket, std::memory_order_release);
        table_->ring_ranks();
    }
    maintain_again_ns_.store(now + (given != 0 ? 0 : kMaintainPauseNs), std::memory_order_relaxed);
}

// Before an allocation under pressure: free pages that others have the better claim to, or that are above the limit,
// go first, so that whoever frees and allocates in a loop cannot keep a page from a neighbour who waits for it.
// Evicts nothing.
// The pause that attention() keeps after a maintain() that gave nothing does not count here: blocks that were freed
// since would be used again before anybody looked.
bool Pool::free_is_due() noexcept {
    return empty_extents_.count() != 0 && (above_limit_.load(std::memory_order_relaxed) || leases_.pressed()) &&
           monotonic_ns() >= unasked_until_ns_;
}

void Pool::answer_with_free() {
    if (!free_is_due()) return;
    const std::uint64_t now = monotonic_ns();
    publish();
    const std::uint64_t ticket = table_->header().ticket.load(std::memory_order_relaxed) + 1;
    std::uint64_t given = give_free(over_limit(false), 0, ticket);
    const PageAsk ask = leases_.pressed() ? leases_.ask() : PageAsk{};
    const std::uint64_t lent = ask.free + ask.along;
    if (given < lent) given += give_free(lent - given, leases_.floor_pages(), ticket);
    if (lent == 0 && given == 0) unasked_until_ns_ = now + kMaintainPauseNs;
    if (given != 0) ordered(given, ticket, now);
}

// What the limit, the neighbours and trims ask, in this order.
Pool::Given Pool::give_asked(std::uint64_t floor, std::uint64_t ticket, std::vector<std::uint32_t> &evicted) {
    const auto evict = [&](std::uint64_t pages, std::uint64_t keep, std::uint64_t &counter) {
        const std::size_t before = evicted.size();
        const std::uint64_t given = evict_extents(pages, keep, ticket, evicted);
        counter += evicted.size() - before;
        return given;
    };
    const bool orders = leases_.read_orders();
    // A lowered limit may cut below what the floor keeps from the neighbours: its order is the operator's own.
    const std::uint64_t over = over_limit(false);
    std::uint64_t given = give_free(over, 0, ticket);
    if (given < over) given += evict(over - given, 0, counters_.evicted_limit);
    const PageAsk ask = leases_.pressed() ? leases_.ask() : PageAsk{};
    const std::uint64_t lent = ask.free + ask.cached;
    if (given < lent + ask.along) given += give_free(lent + ask.along - given, floor, ticket);
    if (given < lent && ask.cached != 0)
        given += evict(std::min(ask.cached, lent - given), floor, counters_.evicted_neighbour);
    const auto missing = [given](std::uint64_t pages) { return pages > given ? pages - given : 0; };
    drain(std::max(missing(over), std::min(missing(lent), ask.in_use)), evicted);
    if (!orders) return {given, 0};
    const std::uint64_t trim = leases_.trim() > trimmed_ ? leases_.trim() - trimmed_ : 0;
    const std::size_t before = transit_.size();
    std::uint64_t trimmed = give_free(trim, floor, ticket);
    if (trimmed < trim) trimmed += evict(trim - trimmed, floor, counters_.evicted_limit);
    for (std::size_t i = before; i < transit_.size(); ++i) extents_[transit_[i]].goes = true;  // that is the answer
    return {given + trimmed, trimmed};
}

// What the idle clock releases.
std::uint64_t Pool::give_idle(std::uint64_t now, std::uint64_t floor, std::uint64_t ticket,
                              std::vector<std::uint32_t> &evicted) {
    const std::uint64_t active = last_active_ns_.load(std::memory_order_relaxed);
    const std::uint64_t quiet_us = now > active ? (now - active) / 1000 : 0;
    if (quiet_us < options_.idle_release_us) return 0;
    std::uint64_t given = 0;
    if (cache_is_due(now)) {
        const std::size_t before = evicted.size();
        given = evict_extents(num_pages_, floor, ticket, evicted);
        counters_.evicted_idle += evicted.size() - before;
    }
    given += give_free(num_pages_, floor, ticket);
    released_free_for_ = active;
    if (cache_is_due(now) && lent_cached_ == 0) released_cache_for_ = active;
    return given;
}

std::vector<std::uint32_t> Pool::maintain(bool idle) {
    if (origin_.elsewhere()) return {};
    const std::scoped_lock lock(mutex_);
    std::uint64_t given = 0;
    std::vector<std::uint32_t> evicted = maintain_locked(idle, &given);
    answer_asked();
    return evicted;
}

std::vector<std::uint32_t> Pool::maintain_locked(bool idle, std::uint64_t *given_pages) {
    std::vector<std::uint32_t> evicted;
    poll_locked();
    const std::uint64_t now = monotonic_ns();
    publish();  // what is asked of us depends on what we say we hold
    const std::uint64_t floor = leases_.floor_pages();
    const std::uint64_t ticket = table_->header().ticket.load(std::memory_order_relaxed) + 1;
    Given given = give_asked(floor, ticket, evicted);
    keep_cache_limit(evicted);
    if (idle) given.pages += give_idle(now, floor, ticket, evicted);
    ordered(given.pages, ticket, now);
    publish();  // before the answers: who waited for them may look at once
    *given_pages = given.pages;
    trimmed_ += given.trimmed;
    return evicted;
}

void Pool::answer_asked() noexcept {
    leases_.answer_orders(trimmed_);
    leases_.answered();
    trimmed_ = 0;
}

std::vector<std::uint32_t> Pool::give_all() {
    std::vector<std::uint32_t> evicted;
    if (origin_.elsewhere()) return evicted;
    const std::scoped_lock lock(mutex_);
    poll_locked();
    const std::uint64_t ticket = table_->header().ticket.load(std::memory_order_relaxed) + 1;
    std::uint64_t given = evict_extents(num_pages_, 0, ticket, evicted);
    counters_.evicted_idle += evicted.size();
    given += give_free(num_pages_, 0, ticket);
    ordered(given, ticket, monotonic_ns());
    publish();
    return evicted;
}

bool Pool::attention() noexcept {
    if (origin_.elsewhere()) return false;
    return (above_limit_.load(std::memory_order_relaxed) || drains_.load(std::memory_order_relaxed) ||
            above_cache_limit_.load(std::memory_order_relaxed) || leases_.pressed()) &&
           monotonic_ns() >= maintain_again_ns_.load(std::memory_order_relaxed);
}

std::uint32_t Pool::preempt_blocks() {
    if (origin_.elsewhere()) return 0;
    const std::scoped_lock lock(mutex_);
    if (poll_locked()) publish();
    const std::uint64_t over = over_limit(true);
    const std::uint64_t spare = held_pages_ + lost_pages_ - usage_now().used;  // free, cached, or being mapped
    if (over <= spare) return 0;
    const std::uint64_t bytes = (over - spare) * options_.page_bytes;
    return static_cast<std::uint32_t>(
        std::min<std::uint64_t>((bytes + options_.block_bytes - 1) / options_.block_bytes, used()));
}

// When maintain(idle) would next have something to release by the clock; capped, so that a thread that waits for it
// also notices answers and deaths.
std::uint64_t Pool::next_deadline_us(bool idle) {
    if (origin_.elsewhere()) return kLookUs;
    const std::scoped_lock lock(mutex_);
    poll_locked();
    const std::uint64_t now = monotonic_ns();
    publish();
    leases_.settle_limits();
    const bool soon = leases_.limit_open() || above_limit_.load(std::memory_order_relaxed) || over_cache_limit();
    const std::uint64_t most = soon ? kOpenOrderUs : kLookUs;
    if (!idle) return most;
    if (over_cache_limit()) return 0;
    const std::uint64_t floor = leases_.floor_pages(), active = last_active_ns_.load(std::memory_order_relaxed);
    const std::uint64_t quiet_us = now > active ? (now - active) / 1000 : 0;
    std::uint64_t due = kNever;
    if (held_pages_ > floor && (empty_extents_.count() != 0 || lent_free_ != 0) && released_free_for_ != active)
        due = options_.idle_release_us;
    if (held_pages_ > floor && own_cache() != 0 && released_cache_for_ != active && options_.cache_release_us != kNever)
        due = std::min(due, std::max(options_.cache_release_us, options_.idle_release_us));
    if (due == kNever) return most;
    if (quiet_us >= due) return 0;
    return std::min(most, due - quiet_us);
}

}  // namespace elastickv
