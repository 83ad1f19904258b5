// Blocks in the hands of an engine that keeps its own list of free blocks and its own tree of cached prefixes.
//
// What lies on that list is known to this process in number only: on a GPU the list is a tensor, and reading it waits
// for the device. So the engine says how many (lend), which is what the ledger needs to know, and reads the list only
// when pages are asked of it (reclaim). Blocks that are free but lie beside used ones cannot go; after a look at the
// list that is known for a while, and such blocks are not shown to the neighbours as theirs to ask for.

#include <algorithm>

#include "base/futex.hpp"
#include "pool/pool.hpp"

namespace elastickv {
namespace {

constexpr std::uint64_t kStuckNs = 100'000'000;
constexpr std::uint64_t kLookPauseNs = 10'000'000;  // after a look that gained nothing; it may wait for the device

}  // namespace

PageUsage Pool::usage_now() const noexcept {
    PageUsage out = usage_;
    if (lent_free_ == 0 && lent_cached_ == 0) return out;
    const auto move = [&](std::uint64_t pages, std::uint64_t &to) {
        pages = std::min(pages, out.used);
        out.used -= pages;
        to += pages;
    };
    const auto pages_of = [&](std::uint64_t blocks) { return blocks * options_.block_bytes / options_.page_bytes; };
    move(pages_of(lent_cached_), out.cached);
    const std::uint64_t free = pages_of(lent_free_);
    const std::uint64_t stuck = monotonic_ns() < stuck_until_ns_ ? std::min(stuck_pages_, free) : 0;
    move(free - stuck, out.free);
    return out;
}

void Pool::lend(std::uint32_t free, std::uint32_t cached) {
    if (origin_.elsewhere()) return;
    const std::scoped_lock lock(mutex_);
    const std::uint32_t all = used();
    lent_free_ = std::min(free, all);
    lent_cached_ = std::min(cached, all - lent_free_);
    if (all != lent_free_ + lent_cached_) mark_active();
    publish();
}

bool Pool::cache_is_due(std::uint64_t now) const noexcept {
    const std::uint64_t active = last_active_ns_.load(std::memory_order_relaxed);
    return options_.cache_release_us != kNever && now > active && (now - active) / 1000 >= options_.cache_release_us;
}

// How many blocks' worth of cached prefixes should go for what is still asked.
std::uint64_t Pool::evict_wanted(bool idle, Evicted *why) {
    if (lent_cached_ == 0) return 0;
    const auto blocks_of = [&](std::uint64_t pages) {
        return (pages * options_.page_bytes + options_.block_bytes - 1) / options_.block_bytes;
    };
    if (idle && cache_is_due(monotonic_ns())) {
        *why = Evicted::idle;
        return lent_cached_;
    }
    std::uint64_t pages = 0;
    const auto want = [&](std::uint64_t more, Evicted reason) {
        if (more > pages) *why = reason;
        pages = std::max(pages, more);
    };
    const std::uint64_t cached = usage_now().cached;
    if (over_cache_limit())
        want(std::max<std::uint64_t>(1, cached - std::min(cached, options_.cache_limit_pages)), Evicted::budget);
    want(leases_.trim() > trimmed_ ? leases_.trim() - trimmed_ : 0, Evicted::limit);
    want(over_limit(false), Evicted::limit);
    if (leases_.pressed()) want(leases_.ask().cached, Evicted::neighbour);
    return std::min<std::uint64_t>(blocks_of(pages), lent_cached_);
}

std::vector<std::uint32_t> Pool::take_back(std::span<const std::uint32_t> free) {
    std::vector<std::uint32_t> kept;
    kept.reserve(free.size());
    for (const std::uint32_t id : free)
        if (state_[id] == BlockState::free) kept.push_back(id);
    std::sort(kept.begin(), kept.end());
    for (const std::uint32_t id : kept) set_state(id, BlockState::used);
    return kept;
}

Result<Pool::Reclaimed> Pool::reclaim(std::span<const std::uint32_t> free, bool idle, bool last) {
    if (origin_.elsewhere()) return not_ours();
    const std::scoped_lock lock(mutex_);
    for (std::size_t i = 0; i < free.size(); ++i) {
        const std::uint32_t id = free[i];
        if (id != 0 && id < options_.num_blocks && state_[id] == BlockState::used) {
            set_state(id, BlockState::free);
            continue;
        }
        while (i-- > 0) set_state(free[i], BlockState::used);  // a wrong list changes nothing
        return Status(Code::invalid,
                      "block " + std::to_string(id) + " is on the engine's list of free blocks" +
                          (id == 0 ? ", and is the null block" : ", twice or without being the engine's"));
    }
    lent_free_ = 0;
    std::uint64_t given = 0;
    (void)maintain_locked(idle, &given);
    Reclaimed out;
    out.evict = evict_wanted(idle, &out.why);
    last = last || out.evict == 0;
    if (last) answer_asked();
    if (last && idle && cache_is_due(monotonic_ns()))
        released_cache_for_ = last_active_ns_.load(std::memory_order_relaxed);
    const std::uint64_t empty = usage_.free;
    out.kept = take_back(free);
    lent_free_ = static_cast<std::uint32_t>(out.kept.size());
    const std::uint64_t pages = lent_free_ * options_.block_bytes / options_.page_bytes;
    stuck_pages_ = pages - std::min(pages, empty);
    stuck_until_ns_ = monotonic_ns() + kStuckNs;
    if (given == 0) maintain_again_ns_.store(monotonic_ns() + kLookPauseNs, std::memory_order_relaxed);
    publish();
    return out;
}

std::uint64_t Pool::headroom_blocks() {
    if (origin_.elsewhere()) return 0;
    const std::uint64_t room = leases_.headroom();
    const std::scoped_lock lock(mutex_);
    const std::uint64_t pages = std::min<std::uint64_t>(room, absent_pages_.count()) + recallable_pages();
    return coming_ + pages * options_.page_bytes / options_.block_bytes;
}

void Pool::count_evicted(Evicted why, std::uint64_t blocks) noexcept {
    if (origin_.elsewhere()) return;
    const std::scoped_lock lock(mutex_);
    switch (why) {
        case Evicted::need: counters_.evicted_need += blocks; break;
        case Evicted::neighbour: counters_.evicted_neighbour += blocks; break;
        case Evicted::limit: counters_.evicted_limit += blocks; break;
        case Evicted::idle: counters_.evicted_idle += blocks; break;
        case Evicted::budget: counters_.evicted_budget += blocks; break;
    }
    publish();
}

}  // namespace elastickv
