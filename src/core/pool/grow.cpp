// How the pool grows: plan extents, lease them, order them, wait for the ranks' answers; all or nothing.

#include <algorithm>
#include <bit>
#include <utility>

#include "base/faultpoint.hpp"
#include "base/futex.hpp"
#include "pool/pool.hpp"

namespace elastickv {
namespace {

constexpr std::uint64_t kWaitSliceUs = 2'000;        // a lost wake-up costs at most this
constexpr std::uint64_t kLapseNs = 100'000'000;      // a wait that is not renewed is over, as the ledger's demand is
constexpr std::uint64_t kStockRetryNs = 50'000'000;  // after a refusal the stock is not asked for again at once

}  // namespace

std::uint64_t Pool::pages_for(std::uint64_t blocks) const noexcept {
    return (blocks * options_.block_bytes + options_.page_bytes - 1) / options_.page_bytes;
}

std::uint64_t Pool::pages_in(const std::vector<Run> &runs) noexcept {
    std::uint64_t pages = 0;
    for (const Run &run : runs) pages += run.pages;
    return pages;
}

// An extent is at most about 1/16 of what is held, so its slack stays under 1/16 too (docs/design.md).
std::uint32_t Pool::extent_target(std::uint64_t held) const noexcept {
    const std::uint64_t share = std::bit_floor(std::max<std::uint64_t>(1, held / 16));
    return static_cast<std::uint32_t>(std::min<std::uint64_t>(share, options_.max_extent_pages));
}

// The lowest absent pages that make `blocks` more blocks whole, as extents; fewer if the range or most_pages ends.
// What is asked for at once counts as held, so that a burst takes few large extents. The last extent may be larger than
// what is needed, unless `exact`.
std::vector<Pool::Run> Pool::plan(std::uint32_t blocks, std::uint64_t most_pages, bool exact) const {
    std::vector<Run> runs;
    const std::uint32_t target = extent_target(held_pages_ + pages_for(blocks));
    std::uint32_t whole = 0;
    std::uint32_t partial_block = 0, partial_left = 0;  // a block cut by the end of the previous run
    std::uint64_t page = absent_pages_.first_from(0);
    while (whole < blocks && page != Bitmap::npos && most_pages > 0) {
        Run run{static_cast<std::uint32_t>(page), 0};
        const std::uint64_t needed = exact ? pages_for(blocks - whole) : num_pages_;
        const std::uint64_t longest = std::min<std::uint64_t>({target, needed, most_pages, num_pages_ - page});
        while (run.pages < longest && absent_pages_.contains(page + run.pages)) ++run.pages;
        for (std::uint32_t block = first_block(run.first); block <= last_block(run.first + run.pages - 1); ++block) {
            std::uint32_t left = missing_[block];
            if (partial_left != 0 && block == partial_block) left = partial_left;
            left -= pages_of_block_in(block, run);
            if (left == 0 && block != 0) ++whole;
            partial_block = block;
            partial_left = left;
        }
        most_pages -= run.pages;
        page = absent_pages_.first_from(page + run.pages);
        runs.push_back(run);
    }
    return runs;
}

void Pool::order_map(const Run &run) {
    Extent &extent = extents_[run.first];
    extent = {run.pages, 0, 0, extent.generation + 1, Stage::mapping, 0, false};
    heads_.insert(run.first);
    for (std::uint32_t page = run.first; page < run.first + run.pages; ++page) {
        absent_pages_.erase(page);
        head_of_[page] = run.first;
    }
    for (std::uint32_t block = first_block(run.first); block <= last_block(run.first + run.pages - 1); ++block) {
        missing_[block] = static_cast<std::uint16_t>(missing_[block] - pages_of_block_in(block, run));
        if (missing_[block] == 0 && block != 0) ++coming_;
    }
    held_pages_ += run.pages;
    usage_.transit += run.pages;
    transit_.push_back(run.first);
    table_->order(run.first, {extent.generation, run.pages, true, false}, 0);
    (void)fault::point("pool.map.ordered");
}

void Pool::became_mapped(std::uint32_t head) {
    Extent &extent = extents_[head];
    const Run run{head, extent.pages};
    extent.stage = Stage::mapped;
    usage_.transit -= run.pages;
    usage_.free += run.pages;
    for (std::uint32_t block = first_block(head); block <= last_block(head + run.pages - 1); ++block) {
        unready_[block] = static_cast<std::uint16_t>(unready_[block] - pages_of_block_in(block, run));
        if (unready_[block] != 0) continue;
        if (block == 0) {
            state_[0] = BlockState::used;
            count_on_extents(0, BlockState::used, +1);
            continue;
        }
        --coming_;
        if (on_draining(block)) {
            state_[block] = BlockState::withheld;
        } else {
            state_[block] = BlockState::free;
            free_blocks_.insert(block);
        }
        count_block(state_[block], 1);
    }
    reclass(head);
}

// What order_map() and order_recall() count ahead, where it came to nothing.
void Pool::no_longer_coming(std::uint32_t head) {
    const Run run{head, extents_[head].pages};
    for (std::uint32_t block = first_block(head); block <= last_block(head + run.pages - 1); ++block) {
        if (missing_[block] == 0 && block != 0) --coming_;
        missing_[block] = static_cast<std::uint16_t>(missing_[block] + pages_of_block_in(block, run));
    }
    held_pages_ -= run.pages;
}

// The lease is not ours to return: each rank gave its share back when it let go.
void Pool::became_absent(std::uint32_t head) {
    (void)fault::point("pool.unmap.settled");
    Extent &extent = extents_[head];
    const std::uint32_t pages = extent.pages;
    usage_.transit -= pages;
    if (extent.stage == Stage::unmapping) {
        usage_.leaving -= pages;
        ++returned_;
    }
    extent.stage = Stage::none;
    heads_.erase(head);
    for (std::uint32_t page = head; page < head + pages; ++page) absent_pages_.insert(page);
}

// Looks whether all ranks have answered the order of the extent; true when its stage changed for good.
bool Pool::settle(std::uint32_t head) {
    Extent &extent = extents_[head];
    bool failed = false, stuck = false;
    for (std::uint32_t rank = 0; rank < table_->ranks(); ++rank) {
        const auto answer = Answer::unpack(table_->so(rank, head).load(std::memory_order_acquire));
        if (answer.generation != extent.generation) return false;
        failed = failed || answer.so == So::failed;
        stuck = stuck || answer.so == So::stuck;
    }
    if (extent.stage == Stage::mapping && !failed) {
        (void)fault::point("pool.map.settled");
        ++grown_;
        became_mapped(head);
        return true;
    }
    if (extent.stage == Stage::recalling && !failed) {
        (void)fault::point("pool.recall.settled");
        ++recalled_;
        became_mapped(head);
        return true;
    }
    if (extent.stage == Stage::recalling) {
        end_recall(head);
        return false;
    }
    if (extent.stage == Stage::mapping) {  // some rank could not: none keeps it
        ++map_failures_;
        no_longer_coming(head);
        extent.stage = Stage::rolling_back;
        table_->order(head, {++extent.generation, extent.pages, false, false}, 0);
        table_->ring_ranks();
        return false;
    }
    if (stuck) {
        if (extent.stage == Stage::unmapping) usage_.leaving -= extent.pages;
        extent.stage = Stage::lost;
        usage_.transit -= extent.pages;
        usage_.used += extent.pages;  // leased and out of reach until the engine ends
        lost_pages_ += extent.pages;
        return true;
    }
    became_absent(head);
    return true;
}

bool Pool::poll_locked() {
    if (transit_.empty()) return false;
    const std::uint32_t bell = table_->header().answer_bell.load(std::memory_order_acquire);
    if (bell == answers_seen_) return false;
    answers_seen_ = bell;
    bool changed = false;
    for (std::size_t i = 0; i < transit_.size();) {
        if (!settle(transit_[i])) {
            ++i;
            continue;
        }
        transit_[i] = transit_.back();
        transit_.pop_back();
        changed = true;
    }
    return changed;
}

void Pool::poll() {
    if (origin_.elsewhere()) return;
    const std::scoped_lock lock(mutex_);
    if (poll_locked()) publish();
    leases_.settle_limits();
}

// Leases and orders what `shortfall` blocks need, whole or not at all.
bool Pool::grow(std::uint32_t shortfall, bool ring, Status *why) {
    if (fault::point("pool.grow.begin")) {
        *why = {Code::unavailable, "injected: none now"};
        return false;
    }
    std::uint64_t refused = 0;
    // A neighbour is not asked for more than is needed, and a budget that is nearly used up is used up.
    for (const bool exact : {false, true}) {
        if (ring && !exact) continue;
        const std::vector<Run> runs = plan(shortfall, num_pages_, exact);
        const std::uint64_t pages = pages_in(runs);
        if (pages == 0) {
            // Only what is on its way out is worth a wait; no neighbour can help.
            *why = {transit_.empty() ? Code::limit : Code::unavailable, "every page of the virtual range is in use"};
            return false;
        }
        if (pages == refused) return false;
        *why = leases_.lease(pages, ring);
        if (why->ok()) {
            (void)fault::point("pool.grow.leased");
            for (const Run &run : runs) order_map(run);
            table_->ring_ranks();
            return true;
        }
        refused = pages;
    }
    return false;
}

// Would the own cache and the room that is left on the devices do, both together?
bool Pool::covered_by_both(std::uint64_t blocks) {
    if (own_cache() == 0) return false;
    const std::uint64_t room = std::min<std::uint64_t>(leases_.headroom(), num_pages_);
    return own_cache() + room * options_.page_bytes / options_.block_bytes >= blocks;
}

// What can be had of it now; the own cache covers the rest.
bool Pool::grow_partly(std::uint32_t shortfall) {
    const std::uint64_t room = leases_.headroom();
    if (room == 0) return false;
    const std::vector<Run> runs = plan(shortfall, room, true);
    const std::uint64_t pages = pages_in(runs);
    if (pages == 0 || !leases_.lease(pages, false).ok()) return false;
    for (const Run &run : runs) order_map(run);
    table_->ring_ranks();
    return true;
}

// Maps ahead of demand while nobody else wants the memory. Never waits, never rings.
void Pool::keep_stock() {
    const std::uint64_t stock = options_.stock_pages == kNever ? extent_target(held_pages_) : options_.stock_pages;
    const std::uint64_t ahead = free_blocks_.count() + coming_;
    if (stock == 0 || ahead * options_.block_bytes >= stock * options_.page_bytes) return;
    if (leases_.pressed() || monotonic_ns() - last_stock_miss_ns_ < kStockRetryNs) return;
    const auto wanted = static_cast<std::uint32_t>(
        std::max<std::uint64_t>(1, stock * options_.page_bytes / options_.block_bytes) - ahead);
    Status why;
    if (!grow(std::max<std::uint32_t>(1, wanted), false, &why)) last_stock_miss_ns_ = monotonic_ns();
}

bool Pool::ensure_fast(std::uint32_t n) {
    if (origin_.elsewhere()) return false;
    const std::scoped_lock lock(mutex_);
    poll_locked();
    if (free_blocks_.count() < n || attention() || free_is_due() || waits_since_ns_ != 0) return false;
    keep_stock();
    return true;
}

void Pool::set_backlog(std::uint64_t blocks) noexcept {
    if (origin_.elsewhere()) return;
    leases_.set_backlog(
        std::min<std::uint64_t>(pages_for(std::min<std::uint64_t>(blocks, options_.num_blocks)), num_pages_));
}

std::uint32_t Pool::ensure(std::uint32_t n, bool patient, bool growing) {
    if (origin_.elsewhere()) return 0;
    std::unique_lock lock(mutex_);
    if (growing) stop_draining(n);
    return ensure_locked(n, patient, lock);
}

// Measures how long the neighbours were waited for. A patient call ends its own wait; impatient ones that are repeated
// are one wait, from the first refusal to the grant, or to the last refusal if nobody asks again.
void Pool::note_wait(std::uint64_t start, std::uint64_t waited_ns, bool starved, bool patient) noexcept {
    if (waits_since_ns_ != 0 && start > refused_ns_ + kLapseNs) {
        leases_.observe(Latency::lease_wait, refused_ns_ - waits_since_ns_);
        waits_since_ns_ = 0;
    }
    const std::uint64_t now = monotonic_ns();
    if (starved && !patient) {
        if (waits_since_ns_ == 0) waits_since_ns_ = start;
        refused_ns_ = now;
    } else if (waits_since_ns_ != 0) {
        leases_.observe(Latency::lease_wait, now - waits_since_ns_);
        waits_since_ns_ = 0;
    } else if (waited_ns != 0) {
        leases_.observe(Latency::lease_wait, waited_ns);
    }
}

// This call takes the own cache and does not wait, so by the next one the neighbours' idle caches should have made
// room: more is asked of them than this call lacks.
std::uint32_t Pool::ahead_of(std::uint32_t blocks) {
    constexpr std::uint64_t kTimes = 8;
    const std::uint64_t pages = std::min(leases_.reachable(), absent_pages_.count());
    const std::uint64_t most = pages * options_.page_bytes / options_.block_bytes;
    return std::max(blocks, static_cast<std::uint32_t>(std::min(kTimes * blocks, most)));
}

std::uint32_t Pool::ensure_locked(std::uint32_t n, bool patient, std::unique_lock<std::mutex> &lock) {
    const std::uint64_t patience_us = patient ? options_.give_back_wait_us : 0;
    poll_locked();
    answer_with_free();
    const std::uint64_t start = monotonic_ns();
    if (free_blocks_.count() >= n) {
        note_wait(start, 0, false, patient);
        keep_stock();
        return available();
    }
    std::uint64_t waited_ns = 0;
    const std::uint64_t failures = map_failures_;
    bool rang = false, counted = false, asked_ahead = false;
    while (free_blocks_.count() < n) {
        if (map_failures_ != failures && coming_ == 0) break;  // a driver that refuses is not asked in a loop
        const std::uint64_t waited_us = (monotonic_ns() - start) / 1000;
        recall(n);
        const std::uint64_t have = free_blocks_.count() + coming_;
        const std::uint32_t seen_freed = leases_.freed_word();
        Status why;
        if (have < n && !grow(static_cast<std::uint32_t>(n - have), rang, &why)) {
            if (!std::exchange(counted, true)) ++counters_.misses;
            const bool own_cache_covers = have + own_cache() >= n || covered_by_both(n - have);
            if (why.code() == Code::unavailable && !rang) {
                rang = true;
                continue;  // once more, with the bell: the demand is on the ledger from here on
            }
            if (own_cache_covers && why.code() == Code::unavailable && !asked_ahead) {
                asked_ahead = true;
                if (grow(ahead_of(static_cast<std::uint32_t>(n - have)), true, &why)) continue;
            }
            if (own_cache_covers) {
                if (!grow_partly(static_cast<std::uint32_t>(n - have)) && coming_ == 0) break;
            } else if (why.code() != Code::unavailable || waited_us >= patience_us) {
                if (coming_ == 0) break;
            } else if (coming_ == 0) {
                lock.unlock();
                const std::uint64_t slept = monotonic_ns();
                leases_.wait_freed(seen_freed, std::min(kWaitSliceUs, patience_us - waited_us));
                waited_ns += monotonic_ns() - slept;
                lock.lock();
                poll_locked();
                continue;
            }
        }
        if (waited_us >= options_.map_deadline_us) break;
        if (coming_ != 0 || !transit_.empty()) {
            const std::uint32_t seen = answers_seen_;
            lock.unlock();
            futex_wait(table_->header().answer_bell, seen, kWaitSliceUs);
            lock.lock();
        }
        poll_locked();
    }
    note_wait(start, waited_ns, rang && available() < n, patient);
    if (rang && free_blocks_.count() >= n) leases_.withdraw();  // else the demand stands until it expires
    mark_active();
    publish();
    return available();
}

Status Pool::wait_ready(std::uint64_t timeout_ms) {
    if (origin_.elsewhere()) return not_ours();
    const std::uint64_t until = monotonic_ns() + timeout_ms * 1'000'000U;
    while (true) {
        std::uint32_t seen = 0, attached = 0;
        {
            const std::scoped_lock lock(mutex_);
            seen = table_->header().answer_bell.load(std::memory_order_acquire);
            poll_locked();
            publish();
            if (state_[0] == BlockState::used) return {};
            if (map_failures_ != 0)
                return {Code::out_of_memory, std::string("mapping block 0 failed: ") + table_->rank(0).error};
        }
        for (std::uint32_t rank = 0; rank < table_->ranks(); ++rank)
            attached += table_->rank(rank).state.load() == static_cast<std::uint32_t>(RankState::attached) ? 1 : 0;
        const std::uint64_t now = monotonic_ns();
        if (now >= until)
            return {Code::timeout, "waited " + std::to_string(timeout_ms) +
                                       " ms for block 0 on every rank: " + std::to_string(attached) + " of " +
                                       std::to_string(table_->ranks()) + " ranks are attached"};
        futex_wait(table_->header().answer_bell, seen, std::min<std::uint64_t>(50'000, (until - now) / 1000 + 1));
    }
}

}  // namespace elastickv
