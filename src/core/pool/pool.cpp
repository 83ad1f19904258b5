#include "pool/pool.hpp"

#include <algorithm>

#include "base/faultpoint.hpp"
#include "base/futex.hpp"

namespace elastickv {

Result<std::unique_ptr<Pool>> Pool::make(std::shared_ptr<PageTable> table, std::vector<Leases::Share> shares,
                                         const PoolOptions &options) {
    if (options.num_blocks < 2 || options.block_bytes == 0 || options.page_bytes == 0)
        return Status(Code::invalid, "a pool of " + std::to_string(options.num_blocks) + " blocks of " +
                                         std::to_string(options.block_bytes) + " bytes on pages of " +
                                         std::to_string(options.page_bytes) +
                                         " bytes: at least 2 blocks are needed (block 0 is never handed out)");
    if (options.block_bytes / options.page_bytes > 60000)
        return Status(Code::invalid, "a block of " + std::to_string(options.block_bytes) + " bytes spans more than " +
                                         "60000 pages of " + std::to_string(options.page_bytes) +
                                         " bytes: choose a larger page");
    const std::uint64_t pages =
        (options.num_blocks * options.block_bytes + options.page_bytes - 1) / options.page_bytes;
    if (pages != table->pages())
        return Status(Code::invalid, "the pool needs " + std::to_string(pages) + " pages, its page table has " +
                                         std::to_string(table->pages()));
    if (shares.empty() || options.max_extent_pages == 0)
        return Status(Code::invalid, "a pool needs a tenant on at least one device and extents of at least one page");
    for (const auto &share : shares)
        if (share.page_cost == 0) return Status(Code::invalid, "a page that costs no bytes cannot be leased");
    std::unique_ptr<Pool> pool(new Pool(std::move(table), std::move(shares), options));
    // Block 0 is the engines' null block: its pages are mapped from the start and for ever.
    const Run run{0, pool->last_page(0) + 1};
    if (Status leased = pool->lease_patiently(run.pages); !leased.ok()) {
        pool->leases_.withdraw();
        return Status(leased.code(), "no room for the first page of the cache: " + leased.message());
    }
    pool->order_map(run);
    pool->table_->ring_ranks();
    pool->publish();
    return pool;
}

// An engine may start beside neighbours who hold everything: they are asked, and answer once they look.
Status Pool::lease_patiently(std::uint64_t pages) {
    constexpr std::uint64_t slice_us = 10'000;
    const std::uint64_t until = monotonic_ns() + options_.map_deadline_us * 1'000U;
    const std::uint64_t start = monotonic_ns();
    for (bool waited = false;; waited = true) {
        const std::uint32_t seen = leases_.freed_word();
        Status leased = leases_.lease(pages, true);
        if (leased.code() != Code::unavailable || monotonic_ns() >= until) {
            if (waited) leases_.observe(Latency::lease_wait, monotonic_ns() - start);
            return leased;
        }
        leases_.wait_freed(seen, slice_us);
    }
}

Pool::Pool(std::shared_ptr<PageTable> table, std::vector<Leases::Share> shares, const PoolOptions &options)
    : table_(std::move(table)),
      options_(options),
      leases_(std::move(shares)),
      num_pages_(static_cast<std::uint32_t>(table_->pages())),
      state_(options.num_blocks, BlockState::absent),
      missing_(options.num_blocks),
      unready_(options.num_blocks),
      free_blocks_(options.num_blocks),
      lru_(options.num_blocks),
      extents_(num_pages_),
      head_of_(num_pages_),
      absent_pages_(num_pages_),
      empty_extents_(num_pages_),
      heads_(num_pages_),
      draining_(num_pages_),
      evictable_(num_pages_, kThinnessClasses) {
    for (std::uint32_t block = 0; block < options.num_blocks; ++block)
        missing_[block] = unready_[block] = static_cast<std::uint16_t>(last_page(block) - first_page(block) + 1);
    for (std::uint32_t page = 0; page < num_pages_; ++page) absent_pages_.insert(page);
    usage_.virtual_pages = num_pages_;
    usage_.pinned = last_page(0) + 1ULL;
    mark_active();
}

Pool::~Pool() { close(); }

Status Pool::not_ours() const {
    return {Code::denied, "this pool belongs to the parent process; a forked child must make its own"};
}

void Pool::close() noexcept {
    if (origin_.elsewhere()) return;
    table_->header().closed.store(1, std::memory_order_release);
    table_->ring_ranks();
}

std::uint32_t Pool::last_block(std::uint32_t page) const noexcept {
    const std::uint64_t last = ((page + 1ULL) * options_.page_bytes - 1) / options_.block_bytes;
    return static_cast<std::uint32_t>(std::min<std::uint64_t>(last, options_.num_blocks - 1));
}

std::uint32_t Pool::pages_of_block_in(std::uint32_t block, const Run &run) const noexcept {
    const std::uint32_t low = std::max(first_page(block), run.first);
    const std::uint32_t high = std::min(last_page(block), run.first + run.pages - 1);
    return high - low + 1;
}

// The pages of a mapped extent count as used, cached or free; one used block makes the extent used.
void Pool::count_on_extents(std::uint32_t block, BlockState state, int delta) noexcept {
    const std::uint32_t last = last_page(block);
    for (std::uint32_t page = first_page(block); page <= last;) {
        const std::uint32_t head = head_of_[page];
        Extent &extent = extents_[head];
        auto &bucket = extent.used != 0 ? usage_.used : extent.cached != 0 ? usage_.cached : usage_.free;
        bucket -= extent.pages;
        auto &count = state == BlockState::used ? extent.used : extent.cached;
        count = static_cast<std::uint32_t>(static_cast<int>(count) + delta);
        auto &now = extent.used != 0 ? usage_.used : extent.cached != 0 ? usage_.cached : usage_.free;
        now += extent.pages;
        if (&now != &bucket || extent.used == 0) reclass(head);
        page = head + extent.pages;
    }
}

// Moves a block between free, used and cached. Its pages are mapped. On a draining extent what is free is withheld, and
// what is cached is doomed: taken for the next request it would keep the extent for as long as that runs.
void Pool::set_state(std::uint32_t block, BlockState to) noexcept {
    if ((to == BlockState::free || to == BlockState::cached) && on_draining(block))
        to = to == BlockState::free ? BlockState::withheld : BlockState::doomed;
    const BlockState from = state_[block];
    if (from == to) return;
    state_[block] = to;
    if (from == BlockState::free)
        free_blocks_.erase(block);
    else if (from == BlockState::cached)
        lru_.remove(block);
    if (to == BlockState::free)
        free_blocks_.insert(block);
    else if (to == BlockState::cached)
        lru_.push_newest(block);
    // The new count goes first, so that a page that stays in use never looks free in between.
    const auto counts = [](BlockState state) {
        return state == BlockState::used || state == BlockState::cached || state == BlockState::doomed;
    };
    if (counts(to)) count_on_extents(block, to, +1);
    if (counts(from)) count_on_extents(block, from, -1);
    count_block(from, ~std::uint32_t{0});
    count_block(to, 1);
}

void Pool::count_block(BlockState state, std::uint32_t delta) noexcept {
    if (state == BlockState::used)
        used_blocks_.fetch_add(delta, std::memory_order_relaxed);
    else if (state == BlockState::withheld)
        withheld_ += delta;
    else if (state == BlockState::doomed)
        doomed_ += delta;
    else
        available_.fetch_add(delta, std::memory_order_relaxed);
}

void Pool::publish() noexcept {
    const PageUsage usage = usage_now();
    leases_.publish(usage, used() > lent_free_ + lent_cached_, counters_);
    const bool above = over_cache_limit();
    if (above && !above_cache_limit_.load(std::memory_order_relaxed)) leases_.ring_self();  // an engine may fall idle
    above_cache_limit_.store(above, std::memory_order_relaxed);
    above_limit_.store(usage.free + usage.cached != 0 && over_limit(false) != 0, std::memory_order_relaxed);
}

std::uint32_t Pool::available() const noexcept { return available_.load(std::memory_order_relaxed); }

void Pool::take_locked(std::span<std::uint32_t> out, std::uint32_t *evicted) noexcept {
    *evicted = 0;
    std::uint64_t from = 0;
    for (std::uint32_t &id : out) {
        const std::uint64_t free = free_blocks_.first_from(from);
        if (free != Bitmap::npos) {
            id = static_cast<std::uint32_t>(free);
            from = free + 1;
        } else {
            id = lru_.oldest();
            ++*evicted;
            from = options_.num_blocks;
        }
        set_state(id, BlockState::used);
    }
    counters_.evicted_need += *evicted;
    (void)fault::point("pool.take.done");
    mark_active();
    publish();
}

Result<std::uint32_t> Pool::take(std::span<std::uint32_t> out) {
    if (origin_.elsewhere()) return not_ours();
    const std::scoped_lock lock(mutex_);
    if (out.size() > available())
        return Status(Code::invalid, std::to_string(out.size()) + " blocks were taken with " +
                                         std::to_string(available()) + " available: ask ensure() first");
    std::uint32_t evicted = 0;
    take_locked(out, &evicted);
    return evicted;
}

bool Pool::alloc(std::span<std::uint32_t> out, std::uint32_t *evicted) {
    if (origin_.elsewhere()) return false;
    std::unique_lock lock(mutex_);
    if (ensure_locked(static_cast<std::uint32_t>(out.size()), true, lock) < out.size()) return false;
    take_locked(out, evicted);
    return true;
}

Status Pool::release(std::span<const std::uint32_t> ids, bool cached) {
    if (origin_.elsewhere()) return not_ours();
    const std::scoped_lock lock(mutex_);
    for (std::size_t i = 0; i < ids.size(); ++i) {
        const std::uint32_t id = ids[i];
        if (id != 0 && id < options_.num_blocks && state_[id] == BlockState::used) {
            set_state(id, cached ? BlockState::cached : BlockState::free);
            continue;
        }
        const bool twice = std::find(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(i), id) !=
                           ids.begin() + static_cast<std::ptrdiff_t>(i);
        while (i-- > 0) set_state(ids[i], BlockState::used);  // a wrong list changes nothing
        return {Code::invalid, "block " + std::to_string(id) + " was released " +
                                   (twice     ? "twice"
                                    : id == 0 ? "but is the null block"
                                              : "but is not in use")};
    }
    (void)fault::point("pool.release.done");
    mark_active();
    publish();
    return {};
}

Status Pool::touch(std::uint32_t id) {
    if (origin_.elsewhere()) return not_ours();
    const std::scoped_lock lock(mutex_);
    if (id >= options_.num_blocks || !is_cached(id))
        return {Code::invalid, "block " + std::to_string(id) + " was touched but is not cached"};
    set_state(id, BlockState::used);
    mark_active();
    publish();
    return {};
}

Status Pool::uncache(std::span<const std::uint32_t> ids) {
    if (origin_.elsewhere()) return not_ours();
    const std::scoped_lock lock(mutex_);
    for (const std::uint32_t id : ids) {
        if (id >= options_.num_blocks)
            return {Code::invalid,
                    "there is no block " + std::to_string(id) + " in a pool of " + std::to_string(options_.num_blocks)};
        if (is_cached(id)) set_state(id, BlockState::free);
    }
    publish();
    return {};
}

}  // namespace elastickv
