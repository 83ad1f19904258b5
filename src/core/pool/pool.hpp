// The pool: which blocks are free, used or cached, and which pages they need.
//
// Lives in the process that schedules. Hands out mapped blocks only, lowest address first, so that high extents drain
// first. Every block operation is O(pages a block spans) plus O(log64 blocks): no scan over pages or blocks.
// Growing and giving back work by extents: a run of pages behind one driver handle. All methods are thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/origin.hpp"
#include "base/status.hpp"
#include "memory/page_table.hpp"
#include "pool/bitmap.hpp"
#include "pool/leases.hpp"
#include "pool/lru.hpp"

namespace elastickv {

inline constexpr std::uint64_t kNever = ~std::uint64_t{0};

struct PoolOptions {
    std::uint32_t num_blocks = 0;
    std::uint64_t block_bytes = 0;  // one block within one span, in the table's units
    std::uint64_t page_bytes = 0;   // one page within one span, in the same units
    std::uint32_t max_extent_pages = 1;
    std::uint64_t stock_pages = kNever;  // mapped free pages kept ahead of demand; kNever: one extent
    std::uint64_t idle_release_us = 2'000'000;
    std::uint64_t cache_release_us = kNever;
    std::uint64_t give_back_wait_us = 20'000;   // how long an allocation waits for the neighbours
    std::uint64_t map_deadline_us = 5'000'000;  // how long it waits for the mappers
    std::uint64_t cache_limit_pages = kNever;   // most pages that hold cached blocks alone, after maintain()
};

// Where the extent is being drained, withheld is free and not handed out, and doomed is cached and not taken for other
// contents: the next maintain() drops it.
enum class BlockState : std::uint8_t { absent = 0, free = 1, used = 2, cached = 3, withheld = 4, doomed = 5 };

// Why cached blocks were dropped; see Counters.
enum class Evicted : std::uint8_t { need = 0, neighbour = 1, limit = 2, idle = 3, budget = 4 };

struct PoolStats {
    std::uint32_t num_blocks = 0, free = 0, used = 0, cached = 0, withheld = 0, coming = 0;
    PageUsage pages;
    std::uint64_t extents = 0, lost_pages = 0, tickets = 0, map_failures = 0;
    std::uint64_t grown_extents = 0, returned_extents = 0;
    std::uint64_t recalled_extents = 0;  // were on their way out and stayed
    Counters counters;
};

// In a forked child every call is denied, does nothing, or answers "none".
class Pool {
  public:
    static Result<std::unique_ptr<Pool>> make(std::shared_ptr<PageTable> table, std::vector<Leases::Share> shares,
                                              const PoolOptions &options);
    ~Pool();

    // Has `n` blocks available if it can: maps more under a lease, else counts the own cache, else asks the
    // neighbours and waits give_back_wait. Returns the blocks available now (mapped free + cached); never fails.
    // Not `patient`: asks the neighbours too, and does not wait for them. `growing`: for requests that run already;
    // before such a one would have to be stopped, blocks that are withheld for neighbours are handed out.
    std::uint32_t ensure(std::uint32_t n, bool patient = true, bool growing = false);
    // The same where it needs no waiting: true when `n` mapped free blocks are there already.
    bool ensure_fast(std::uint32_t n);
    // How many blocks the engine would take after the next ensure(): requests that wait. Where ensure() is refused, the
    // neighbours hear of both. Stands until it is set anew.
    void set_backlog(std::uint64_t blocks) noexcept;
    std::uint32_t available() const noexcept;
    std::uint32_t used() const noexcept { return used_blocks_.load(std::memory_order_relaxed); }

    // Takes out.size() blocks: free ones lowest first, then the oldest cached ones, which stand last; returns how many
    // those are (their owner must forget what they held). Takes none and returns invalid when too few are available.
    Result<std::uint32_t> take(std::span<std::uint32_t> out);
    // Used → free or cached (newest, in order). invalid, with nothing changed, if one of them is not in use.
    Status release(std::span<const std::uint32_t> ids, bool cached);
    Status touch(std::uint32_t id);                      // cached → used
    Status uncache(std::span<const std::uint32_t> ids);  // cached → free; other states are left alone
    // ensure + take in one, or nothing: false means "none now".
    bool alloc(std::span<std::uint32_t> out, std::uint32_t *evicted);

    // Does what is asked: acknowledges limits, gives back, evicts (the returned blocks are free: forget their
    // contents at once), releases when idle. A ticket that grew must reach the ranks.
    std::vector<std::uint32_t> maintain(bool idle);
    // Evicts every cached block and orders every page unmapped that holds none in use, the floor's too: for an engine
    // that goes to sleep. As with maintain(), the returned blocks must be forgotten and the ticket sent.
    std::vector<std::uint32_t> give_all();
    bool attention() noexcept;
    // How many used blocks must at least be given up, by preempting requests, for the tenant to come under a limit that
    // was ordered to hold now; 0: none, for what is free and cached covers it or no such limit is open. Ask again after
    // each preemption and maintain(): pages go only when every block on their extent is given up.
    std::uint32_t preempt_blocks();
    std::uint64_t ticket() const noexcept { return table_->header().ticket.load(std::memory_order_acquire); }
    std::uint64_t next_deadline_us(bool idle);
    void mark_active() noexcept;
    // Reads the ranks' answers; ensure and maintain do it too.
    void poll();

    // --- for an engine that keeps free blocks and cached prefixes itself (lent.cpp)
    //
    // Such an engine takes blocks by the extent and never gives one back by itself: to the pool all it has are used.
    // lend() says what they really are, so that neighbours and the sharing policy see it; reclaim() is its maintain().

    // Of the used blocks the engine has `free` on its own list, and `cached` hold prefixes that it could drop.
    void lend(std::uint32_t free, std::uint32_t cached);
    struct Reclaimed {
        std::vector<std::uint32_t> kept;  // of the free blocks, those that stay the engine's, ascending
        std::uint64_t evict = 0;          // blocks whose prefixes the engine should drop, to be asked again
        Evicted why = Evicted::need;
    };
    // Does what maintain() does with the engine's free blocks: `free` are all that lie on its list, and those that are
    // not among `kept` are gone from it. Where `evict` is not 0 and this is not the `last` call, orders and neighbours
    // are not answered yet: the engine drops so many blocks' worth of prefixes and calls again. invalid, with nothing
    // changed, if one is not used.
    Result<Reclaimed> reclaim(std::span<const std::uint32_t> free, bool idle, bool last);
    void count_evicted(Evicted why, std::uint64_t blocks) noexcept;
    // Blocks that could be mapped now beyond those that are available, without asking anybody.
    std::uint64_t headroom_blocks();

    // Tells the ranks to unmap everything, without fences: nothing may use the cache any more. Idempotent.
    void close() noexcept;

    // The conservation laws, recomputed. Leases are compared at quiet points only: no order open, none on its way back.
    Status check_integrity();
    PoolStats stats();
    const PoolOptions &options() const noexcept { return options_; }
    Leases &leases() noexcept { return leases_; }
    PageTable &table() noexcept { return *table_; }
    // Waits until every rank is attached and block 0 is mapped on all of them.
    Status wait_ready(std::uint64_t timeout_ms);

  private:
    enum class Stage : std::uint8_t { none, mapping, mapped, unmapping, recalling, rolling_back, lost };
    struct Extent {
        std::uint32_t pages = 0;
        std::uint32_t used = 0, cached = 0;  // blocks of the state that lie on it, whole or in part
        std::uint32_t generation = 0;
        Stage stage = Stage::none;
        std::uint8_t thin = 0;  // its list in evictable_
        bool goes = false;      // an order to unmap it stands: a rank has let go already, or it was given for a trim
    };
    struct Run {
        std::uint32_t first = 0, pages = 0;
    };

    Pool(std::shared_ptr<PageTable> table, std::vector<Leases::Share> shares, const PoolOptions &options);

    // geometry
    std::uint32_t first_page(std::uint32_t block) const noexcept {
        return static_cast<std::uint32_t>(block * options_.block_bytes / options_.page_bytes);
    }
    std::uint32_t last_page(std::uint32_t block) const noexcept {
        return static_cast<std::uint32_t>(((block + 1ULL) * options_.block_bytes - 1) / options_.page_bytes);
    }
    std::uint32_t first_block(std::uint32_t page) const noexcept {
        return static_cast<std::uint32_t>(page * options_.page_bytes / options_.block_bytes);
    }
    std::uint32_t last_block(std::uint32_t page) const noexcept;
    std::uint32_t pages_of_block_in(std::uint32_t block, const Run &run) const noexcept;

    // block states (pool.cpp)
    void set_state(std::uint32_t block, BlockState to) noexcept;
    bool is_cached(std::uint32_t block) const noexcept {
        return state_[block] == BlockState::cached || state_[block] == BlockState::doomed;
    }
    void count_block(BlockState state, std::uint32_t delta) noexcept;
    void count_on_extents(std::uint32_t block, BlockState state, int delta) noexcept;
    void publish() noexcept;
    PageUsage usage_now() const noexcept;
    std::uint64_t own_cache() const noexcept { return lru_.count() + lent_cached_; }
    void take_locked(std::span<std::uint32_t> out, std::uint32_t *evicted) noexcept;

    Status lease_patiently(std::uint64_t pages);
    std::uint64_t over_limit(bool now) const noexcept {
        return leases_.over_limit(held_pages_ + lost_pages_, now);  // what is leaving already does not count
    }

    // growing (grow.cpp)
    std::uint32_t extent_target(std::uint64_t held) const noexcept;
    std::vector<Run> plan(std::uint32_t blocks, std::uint64_t most_pages, bool exact) const;
    std::uint64_t pages_for(std::uint64_t blocks) const noexcept;
    static std::uint64_t pages_in(const std::vector<Run> &runs) noexcept;
    void order_map(const Run &run);
    bool grow(std::uint32_t shortfall, bool ring, Status *why);
    bool grow_partly(std::uint32_t shortfall);
    bool covered_by_both(std::uint64_t blocks);
    void keep_stock();
    std::uint32_t ahead_of(std::uint32_t blocks);
    void note_wait(std::uint64_t start, std::uint64_t waited_ns, bool starved, bool patient) noexcept;
    std::uint32_t ensure_locked(std::uint32_t n, bool patient, std::unique_lock<std::mutex> &lock);
    bool poll_locked();
    bool settle(std::uint32_t head);
    void became_mapped(std::uint32_t head);
    void no_longer_coming(std::uint32_t head);
    void became_absent(std::uint32_t head);

    // taking back what is on its way out (recall.cpp)
    bool may_recall(std::uint32_t head) noexcept;
    void order_recall(std::uint32_t head);
    void end_recall(std::uint32_t head);
    void recall(std::uint32_t n);
    std::uint64_t recallable_pages() noexcept;

    // giving back (give.cpp)
    void order_unmap(std::uint32_t head, bool fenced, std::uint64_t ticket);
    std::uint64_t give_free(std::uint64_t pages, std::uint64_t keep, std::uint64_t ticket);

    struct Given {
        std::uint64_t pages = 0, trimmed = 0;  // the latter are among the former
    };
    Given give_asked(std::uint64_t floor, std::uint64_t ticket, std::vector<std::uint32_t> &evicted);
    std::uint64_t give_idle(std::uint64_t now, std::uint64_t floor, std::uint64_t ticket,
                            std::vector<std::uint32_t> &evicted);
    std::vector<std::uint32_t> maintain_locked(bool idle, std::uint64_t *given_pages);
    void answer_asked() noexcept;
    void ordered(std::uint64_t given, std::uint64_t ticket, std::uint64_t now) noexcept;
    bool free_is_due() noexcept;
    void answer_with_free();

    // evicting (evict.cpp)
    static constexpr std::uint32_t kThinnessClasses = 8;
    std::uint32_t thinness(const Extent &extent) const noexcept;
    void reclass(std::uint32_t head) noexcept;
    std::uint32_t next_to_empty(std::uint64_t keep) const noexcept;
    bool over_cache_limit() const noexcept;
    void keep_cache_limit(std::vector<std::uint32_t> &evicted);
    void empty_extent(std::uint32_t head, std::vector<std::uint32_t> &evicted);
    std::uint64_t evict_extents(std::uint64_t pages, std::uint64_t keep, std::uint64_t ticket,
                                std::vector<std::uint32_t> &evicted);

    // draining (drain.cpp)
    bool on_draining(std::uint32_t block) const noexcept;
    void set_draining(std::uint32_t head, bool draining) noexcept;
    void drain(std::uint64_t pages, std::vector<std::uint32_t> &evicted);
    void stop_draining(std::uint32_t blocks) noexcept;

    // lent (lent.cpp)
    bool cache_is_due(std::uint64_t now) const noexcept;
    std::uint64_t evict_wanted(bool idle, Evicted *why);
    std::vector<std::uint32_t> take_back(std::span<const std::uint32_t> free);

    Status check_blocks() const;
    Status check_extents() const;
    bool lease_in_flight() const noexcept;

    Status not_ours() const;

    const Origin origin_;  // a forked child may use nothing of it: the mutex may be held there for ever
    const std::shared_ptr<PageTable> table_;
    const PoolOptions options_;
    Leases leases_;
    std::uint32_t num_pages_ = 0;

    mutable std::mutex mutex_;
    std::vector<BlockState> state_;
    std::vector<std::uint16_t> missing_;  // pages of the block that are not even ordered
    std::vector<std::uint16_t> unready_;  // pages of the block that are not mapped
    Bitmap free_blocks_;
    Lru lru_;
    std::vector<Extent> extents_;         // by first page
    std::vector<std::uint32_t> head_of_;  // by page; valid while the page is in an extent
    Bitmap absent_pages_, empty_extents_, heads_, draining_;
    Lru evictable_;                       // heads of extents with cached blocks and no used ones, by thinness
    std::vector<std::uint32_t> transit_;  // heads whose order is not answered yet
    std::uint32_t answers_seen_ = 0;
    std::uint32_t withheld_ = 0, doomed_ = 0;
    std::uint32_t coming_ = 0;      // blocks whose pages are all mapped or ordered, not all mapped
    std::uint64_t held_pages_ = 0;  // mapping, recalling or mapped
    std::uint64_t draining_pages_ = 0;
    std::uint64_t drain_peak_ = 0, drain_peak_until_ns_ = 0;  // most pages that were to be drained, a while ago
    PageUsage usage_;
    std::uint64_t last_stock_miss_ns_ = 0;
    std::uint64_t unasked_until_ns_ = 0;                 // others wait, and nothing was asked of this pool a moment ago
    std::uint64_t waits_since_ns_ = 0, refused_ns_ = 0;  // a wait for the neighbours over several calls of ensure()
    std::uint64_t released_free_for_ = 0, released_cache_for_ = 0;  // the activity after which the idle clock released
    std::uint64_t lost_pages_ = 0, map_failures_ = 0, grown_ = 0, returned_ = 0, recalled_ = 0;
    Counters counters_;
    std::uint32_t lent_free_ = 0, lent_cached_ = 0;
    std::uint64_t stuck_pages_ = 0, stuck_until_ns_ = 0;  // of lent free blocks, that could not go at the last look
    std::uint64_t trimmed_ = 0;                           // pages given for a trim that is not answered yet
    std::atomic<std::uint32_t> used_blocks_{0}, available_{0};
    std::atomic<bool> above_limit_{false};  // and there are pages that could go
    std::atomic<bool> drains_{false};
    std::atomic<bool> above_cache_limit_{false};
    std::atomic<std::uint64_t> maintain_again_ns_{0};
    std::atomic<std::uint64_t> last_active_ns_{0};
};

}  // namespace elastickv
