#include "memory/rank.hpp"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/faultpoint.hpp"
#include "base/futex.hpp"

namespace elastickv {
namespace {

constexpr std::uint64_t kIdleWaitUs = 100'000;  // looks at `closed` and `stop` at least this often
constexpr std::uint64_t kFencePollUs = 50;      // an event is polled, never waited for: the device has its own pace
constexpr std::uint64_t kSpinNs = 500'000;      // clearing takes microseconds, unless the device is busy with long work
constexpr std::uint64_t kFenceRetryNs = 5'000'000;
constexpr std::uint64_t kReclaimEveryNs =
    1'000'000'000;  // whoever drops its cache needs it again: not at every mapping
constexpr int kTakeDownTries = 3;

}  // namespace

Result<std::unique_ptr<Rank>> Rank::attach(std::shared_ptr<Driver> driver, std::shared_ptr<PageTable> table,
                                           const RankOptions &options, RankHooks hooks) {
    const std::uint64_t granularity = driver->granularity();
    if (options.rank >= table->ranks())
        return Status(Code::invalid, "rank " + std::to_string(options.rank) + " of a page table for " +
                                         std::to_string(table->ranks()) + " ranks");
    if (options.page_bytes == 0 || options.page_bytes % granularity != 0)
        return Status(Code::invalid, "a page of " + std::to_string(options.page_bytes) +
                                         " bytes is no multiple of the driver's granularity of " +
                                         std::to_string(granularity) + " bytes");
    if (options.spans == 0 || options.span_bytes == 0 ||
        (options.spans > 1 && options.span_bytes % options.page_bytes != 0))
        return Status(Code::invalid, std::to_string(options.spans) + " spans of " + std::to_string(options.span_bytes) +
                                         " bytes: with several spans each must be a multiple of the page of " +
                                         std::to_string(options.page_bytes) + " bytes; change the number of blocks");
    const std::uint64_t pages = (options.span_bytes + options.page_bytes - 1) / options.page_bytes;
    if (pages != table->pages())
        return Status(Code::invalid, "this rank's spans have " + std::to_string(pages) + " pages, the page table has " +
                                         std::to_string(table->pages()) +
                                         ": the ranks disagree about the cache's geometry");
    std::unique_ptr<Rank> rank(new Rank(std::move(driver), std::move(table), options, std::move(hooks)));
    auto reserved =
        Reservation::make(rank->driver_, (options.spans - 1) * options.span_bytes + pages * options.page_bytes);
    if (!reserved.ok()) return reserved.status();
    rank->reservation_ = std::move(reserved).value();
    (void)fault::point("memory.rank.reserved");
    std::uint32_t expected = static_cast<std::uint32_t>(RankState::absent);
    if (!rank->slot_.state.compare_exchange_strong(expected, static_cast<std::uint32_t>(RankState::attached)))
        return Status(Code::exists,
                      "rank " + std::to_string(options.rank) + " is attached already; each rank attaches once");
    rank->thread_ = std::thread([self = rank.get()] { self->run(); });
    return rank;
}

Rank::Rank(std::shared_ptr<Driver> driver, std::shared_ptr<PageTable> table, const RankOptions &options,
           RankHooks hooks)
    : driver_(std::move(driver)),
      table_(std::move(table)),
      options_(options),
      hooks_(std::move(hooks)),
      slot_(table_->rank(options_.rank)) {}

Rank::~Rank() { close(); }

void Rank::close() noexcept {
    if (!thread_.joinable()) return;
    if (origin_.elsewhere()) {  // the mapper did not come along with the fork, and the memory is the parent's
        thread_.detach();
        return;
    }
    stop_.store(true, std::memory_order_release);
    table_->ring_ranks();
    thread_.join();
    slot_.state.store(static_cast<std::uint32_t>(RankState::gone), std::memory_order_release);
    futex_ring(table_->header().answer_bell);
}

std::uint64_t Rank::mapped_bytes() const noexcept { return slot_.mapped_bytes.load(std::memory_order_relaxed); }

Status Rank::fence(std::uint64_t ticket, std::uint64_t stream) {
    if (origin_.elsewhere())
        return {Code::denied, "this memory belongs to the parent process; a forked child must attach itself"};
    auto fence = driver_->record(stream);
    if (!fence.ok() && fence.status().code() == Code::invalid) return fence.status();
    if (!fence.ok()) note_failure(fence.status().message());
    {
        const std::scoped_lock lock(fences_mutex_);
        fences_.push_back({ticket, stream, fence.ok() ? std::move(fence).value() : nullptr});
    }
    table_->ring_ranks();
    return {};
}

void Rank::offer_reclaim(bool offered) noexcept {
    reclaim_offered_.store(offered, std::memory_order_release);
    futex_wake_all(reclaim_asked_);  // who has withdrawn need not wait on
}

std::uint32_t Rank::wait_reclaim(std::uint32_t seen, std::uint64_t timeout_us) const noexcept {
    if (reclaim_asked_.load(std::memory_order_acquire) == seen) futex_wait(reclaim_asked_, seen, timeout_us);
    return reclaim_asked_.load(std::memory_order_acquire);
}

void Rank::reclaimed(std::uint32_t request) noexcept {
    reclaim_done_.store(request, std::memory_order_release);
    futex_wake_all(reclaim_done_);
}

// True when somebody was asked and the mapping is worth another try.
bool Rank::reclaim() noexcept {
    const std::uint64_t start = monotonic_ns();
    if (!reclaim_offered_.load(std::memory_order_acquire) || start < reclaim_again_ns_) return false;
    reclaim_again_ns_ = start + kReclaimEveryNs;
    const std::uint32_t request = reclaim_asked_.load(std::memory_order_relaxed) + 1;
    futex_ring(reclaim_asked_);
    const std::uint64_t until = start + options_.reclaim_ms * 1'000'000U;
    for (std::uint64_t now = start; now < until && !stop_.load(std::memory_order_acquire); now = monotonic_ns()) {
        const std::uint32_t done = reclaim_done_.load(std::memory_order_acquire);
        if (done == request) break;
        futex_wait(reclaim_done_, done, std::min<std::uint64_t>((until - now) / 1000 + 1, kIdleWaitUs));
    }
    return true;
}

Status Rank::wait_first_page(std::uint64_t timeout_ms) const {
    const std::uint64_t until = monotonic_ns() + timeout_ms * 1'000'000U;
    auto &bell = table_->header().answer_bell;
    while (true) {
        const std::uint32_t seen = bell.load(std::memory_order_acquire);
        const auto wanted = Wanted::unpack(table_->wanted(0).load(std::memory_order_acquire));
        const auto so = Answer::unpack(table_->so(options_.rank, 0).load(std::memory_order_acquire));
        if (wanted.map && so.generation == wanted.generation && so.so == So::mapped) return {};
        if (wanted.map && so.generation == wanted.generation && so.so == So::failed)
            return {Code::out_of_memory, std::string("mapping block 0 failed: ") + slot_.error};
        const std::uint64_t now = monotonic_ns();
        if (now >= until)
            return {Code::timeout, "waited " + std::to_string(timeout_ms) + " ms for the page of block 0; " +
                                       (wanted.map ? "it is ordered and not mapped" : "it was never ordered")};
        futex_wait(bell, seen, std::min<std::uint64_t>((until - now) / 1000 + 1, kIdleWaitUs));
    }
}

bool Rank::bind() noexcept {
    const Status status = driver_->bind_thread();
    if (!status.ok()) note_failure(status.message());
    return status.ok();
}

void Rank::run() noexcept {
    ::pthread_setname_np(::pthread_self(), "elastickv-map");  // as top -H shows it; 15 characters at most
    auto &header = table_->header();
    while (!stop_.load(std::memory_order_acquire)) {
        const std::uint32_t seen = header.order_bell.load(std::memory_order_acquire);
        if (header.closed.load(std::memory_order_acquire) != 0) break;
        bound_ = bound_ || bind();
        bool worked = drain_ring();
        const bool fences_pending = poll_fences();
        worked = retry_waiting() || worked;
        worked = poll_clearing() || worked;
        if (worked) {
            futex_ring(header.answer_bell);
            continue;
        }
        if (!clearing_.empty() && monotonic_ns() - clearing_.front().since_ns < kSpinNs) {
            std::this_thread::yield();
            continue;
        }
        futex_wait(header.order_bell, seen, fences_pending || !clearing_.empty() ? kFencePollUs : kIdleWaitUs);
    }
    const std::uint64_t until = deadline_ns();  // one for all of them: somebody waits for this thread
    for (Clearing &one : clearing_) wait_cleared(one.fences, until);
    clearing_.clear();
    std::int64_t freed = 0;
    std::int64_t kept = 0;
    for (auto &[page, extent] : extents_) {
        const auto bytes = static_cast<std::int64_t>(extent_bytes(extent.pages));
        const Status status = take_down(extent);
        // What the driver did not let go is on the device, and stays leased until the process ends.
        (status.ok() ? freed : kept) += bytes;
        if (!status.ok()) note_failure(status.message());
    }
    extents_.clear();
    slot_.mapped_bytes.store(static_cast<std::uint64_t>(kept), std::memory_order_relaxed);
    if (freed != 0) {
        hooks_.mapped(-freed);
        hooks_.give(static_cast<std::uint64_t>(freed));
    }
}

bool Rank::drain_ring() noexcept {
    auto &header = table_->header();
    const std::uint64_t tail = header.ring_tail.load(std::memory_order_acquire);
    if (tail == cursor_) return false;
    if (tail - cursor_ > header.ring_size / 2) {  // lapped, or nearly: the words themselves are the truth
        cursor_ = tail;
        for (std::uint32_t page = 0; page < header.pages; ++page) look_at(page);
        return true;
    }
    for (; cursor_ != tail; ++cursor_) {
        look_at(table_->ring_at(cursor_));
        poll_clearing();  // while this extent is being cleared, the next one is mapped
    }
    return true;
}

bool Rank::being_cleared(std::uint32_t page, std::uint32_t generation) const noexcept {
    return std::any_of(clearing_.begin(), clearing_.end(),
                       [&](const Clearing &one) { return one.page == page && one.generation == generation; });
}

// Answers extents whose memory has been cleared, in the order of their clearing; true when there were any.
bool Rank::poll_clearing() noexcept {
    bool worked = false;
    while (!clearing_.empty()) {
        Clearing &one = clearing_.front();
        while (!one.fences.empty()) {
            const Result<bool> done = one.fences.back()->done();
            if (!done.ok()) note_failure(done.status().message());
            if (!done.ok() || !done.value()) return worked;  // never answered: nobody may use what may not be zero
            one.fences.pop_back();
        }
        answer(one.page, one.generation, So::mapped);
        clearing_.pop_front();
        worked = true;
    }
    return worked;
}

// Before memory is taken away again; a device that does not answer within the deadline keeps it.
std::uint64_t Rank::deadline_ns() const noexcept { return monotonic_ns() + options_.deadline_ms * 1'000'000U; }

void Rank::wait_cleared(std::vector<std::unique_ptr<Fence>> &fences, std::uint64_t until_ns) const noexcept {
    for (const auto &fence : fences) {
        for (;;) {
            const Result<bool> done = fence->done();
            if (!done.ok() || done.value() || monotonic_ns() >= until_ns) break;
            std::this_thread::yield();
        }
    }
}

void Rank::look_at(std::uint32_t page) noexcept {
    if (page >= table_->pages()) return;
    const auto wanted = Wanted::unpack(table_->wanted(page).load(std::memory_order_acquire));
    const auto so = Answer::unpack(table_->so(options_.rank, page).load(std::memory_order_relaxed));
    if (wanted.generation == 0 || so.generation == wanted.generation) return;
    if (wanted.map && wanted.recall) {
        recall_extent(page, wanted);
        return;
    }
    if (wanted.map) {
        if (!being_cleared(page, wanted.generation)) map_extent(page, wanted);
        return;
    }
    const std::uint64_t ticket = table_->ticket(page).load(std::memory_order_relaxed);
    if (wanted.fenced && slot_.fence_passed.load(std::memory_order_relaxed) < ticket)
        waiting_.push_back(page);
    else
        unmap_extent(page, wanted);
}

// Has the oldest fence recorded, where the driver would not at first; false while it still will not.
bool Rank::record_front() noexcept {
    PendingFence &front = fences_.front();
    if (front.fence) return true;
    const std::uint64_t now = monotonic_ns();
    if (now < fence_again_ns_) return false;
    auto fence = driver_->record(front.stream);
    if (fence.ok()) {
        front.fence = std::move(fence).value();
        return true;
    }
    note_failure(fence.status().message());
    fence_again_ns_ = now + kFenceRetryNs;
    return false;
}

// True while fences are pending. One that cannot be recorded or asked about has not passed: its pages stay mapped, and
// it is recorded anew.
bool Rank::poll_fences() noexcept {
    const std::scoped_lock lock(fences_mutex_);
    while (!fences_.empty()) {
        if (!record_front()) return true;
        PendingFence &front = fences_.front();
        const auto done = front.fence->done();
        if (!done.ok()) {
            note_failure(done.status().message());
            front.fence.reset();
            fence_again_ns_ = monotonic_ns() + kFenceRetryNs;
            return true;
        }
        if (!done.value()) return true;
        const std::uint64_t passed = slot_.fence_passed.load(std::memory_order_relaxed);
        slot_.fence_passed.store(std::max(passed, front.ticket), std::memory_order_release);
        (void)fault::point("memory.fence.passed");
        fences_.pop_front();
    }
    return false;
}

bool Rank::retry_waiting() noexcept {
    const std::uint64_t passed = slot_.fence_passed.load(std::memory_order_relaxed);
    bool worked = false;
    for (std::size_t i = 0; i < waiting_.size();) {
        const std::uint32_t page = waiting_[i];
        if (table_->ticket(page).load(std::memory_order_relaxed) > passed) {
            ++i;
            continue;
        }
        waiting_[i] = waiting_.back();
        waiting_.pop_back();
        look_at(page);
        worked = true;
    }
    return worked;
}

Status Rank::map_pieces(std::uint32_t page, Extent &extent, std::vector<std::unique_ptr<Fence>> &clearing) {
    const std::uint64_t bytes = options_.page_bytes * extent.pages;
    extent.pieces.reserve(options_.spans);
    if (fault::point("memory.map.begin")) return {Code::out_of_memory, "injected: the device has no memory"};
    for (std::uint64_t span = 0; span < options_.spans; ++span) {
        const Address address = address_of(page, span);
        auto memory = Physical::make(driver_, bytes);
        if (!memory.ok()) return memory.status();
        if (fault::point("memory.map.created")) return {Code::driver, "injected: the mapping is refused"};
        std::unique_ptr<Fence> fence;
        auto mapping = Mapping::make(driver_, address, bytes, memory->id(), &fence);
        if (!mapping.ok()) return mapping.status();
        if (fence) clearing.push_back(std::move(fence));
        extent.pieces.push_back({std::move(memory).value(), std::move(mapping).value()});
    }
    return {};
}

void Rank::keep(std::uint32_t page, Extent extent) noexcept {
    const std::uint64_t bytes = extent_bytes(extent.pages);
    extents_.emplace(page, std::move(extent));
    slot_.mapped_bytes.fetch_add(bytes, std::memory_order_relaxed);
    hooks_.mapped(static_cast<std::int64_t>(bytes));
}

// Takes every piece away again, each call tried a few times. What the driver does not let go of stays in the extent.
Status Rank::take_down(Extent &extent) noexcept {
    while (!extent.pieces.empty()) {
        Piece &piece = extent.pieces.back();
        Status status;
        for (int tries = 1; tries <= kTakeDownTries; ++tries) {
            status = piece.mapping.try_close();
            (void)fault::point("memory.unmap.unmapped");
            if (status.ok()) status = piece.memory.try_close();
            if (status.ok()) break;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        if (!status.ok()) return status;
        extent.pieces.pop_back();
    }
    return {};
}

// All pieces or none; `undone` is false where the driver refused even to take some away again.
Status Rank::map_or_undo(std::uint32_t page, Extent &extent, std::vector<std::unique_ptr<Fence>> &clearing,
                         bool *undone) {
    Status status = map_pieces(page, extent, clearing);
    if (status.ok()) return status;
    wait_cleared(clearing, deadline_ns());
    clearing.clear();
    *undone = take_down(extent).ok();
    return status;
}

void Rank::map_extent(std::uint32_t page, const Wanted &wanted) noexcept {
    const std::uint64_t start = monotonic_ns();
    Extent extent;
    extent.pages = wanted.pages;
    std::vector<std::unique_ptr<Fence>> clearing;
    Status status;
    bool undone = true;
    if (extents_.contains(page))
        status = {Code::invalid, "page " + std::to_string(page) + " was ordered mapped twice"};
    else if (page + std::uint64_t{wanted.pages} > table_->pages() || wanted.pages == 0)
        status = {Code::invalid, "an extent of " + std::to_string(wanted.pages) + " pages at page " +
                                     std::to_string(page) + " leaves the table"};
    else
        status = map_or_undo(page, extent, clearing, &undone);
    if (status.code() == Code::out_of_memory && undone && reclaim())
        status = map_or_undo(page, extent, clearing, &undone);
    if (!status.ok()) {
        note_failure(status.message());
        if (!undone) keep(page, std::move(extent));  // the pool orders it unmapped: then it is tried again
        answer(page, wanted.generation, So::failed);
        return;
    }
    (void)fault::point("memory.map.mapped");
    keep(page, std::move(extent));
    count(true, start);
    if (!clearing.empty()) {
        clearing_.push_back({page, wanted.generation, monotonic_ns(), std::move(clearing)});
        return;
    }
    answer(page, wanted.generation, So::mapped);
    (void)fault::point("memory.map.answered");
}

void Rank::unmap_extent(std::uint32_t page, const Wanted &wanted) noexcept {
    const std::uint64_t start = monotonic_ns();
    const std::uint64_t bytes = extent_bytes(wanted.pages);
    if (const auto found = extents_.find(page); found != extents_.end()) {
        const Status status = fault::point("memory.unmap.begin")
                                  ? Status{Code::driver, "injected: the driver does not let go"}
                                  : take_down(found->second);
        if (!status.ok()) {
            found->second.torn = true;
            // The driver would not let go: the page keeps its lease and is never used again.
            note_failure(status.message());
            answer(page, wanted.generation, So::stuck);
            return;
        }
        extents_.erase(found);
        slot_.mapped_bytes.fetch_sub(bytes, std::memory_order_relaxed);
        count(false, start);
        hooks_.mapped(-static_cast<std::int64_t>(bytes));
    } else if (wanted.recall) {
        // It went by the order before the recall, and its lease with it. In every other order to unmap what is not
        // here, a mapping is rolled back that failed here: that lease was never used and goes back now.
        answer(page, wanted.generation, So::unmapped);
        return;
    }
    // The answer goes first: a pool that sees the lease back must also see the page gone.
    (void)fault::point("memory.unmap.released");
    slot_.giving.fetch_add(bytes, std::memory_order_relaxed);
    answer(page, wanted.generation, So::unmapped);
    (void)fault::point("memory.unmap.answered");
    hooks_.give(bytes);
    slot_.giving.fetch_sub(bytes, std::memory_order_release);
}

// An extent whose unmapping waits for its fence stays as it is. One that is gone already is not mapped again: the pool
// has it unmapped everywhere, then.
void Rank::recall_extent(std::uint32_t page, const Wanted &wanted) noexcept {
    const auto found = extents_.find(page);
    const bool whole = found != extents_.end() && found->second.pages == wanted.pages && !found->second.torn &&
                       !fault::point("memory.recall.begin");
    std::erase(waiting_, page);
    answer(page, wanted.generation, whole ? So::mapped : So::failed);
}

void Rank::count(bool mapped, std::uint64_t start_ns) noexcept {
    const std::uint64_t took = monotonic_ns() - start_ns;
    (mapped ? slot_.maps : slot_.unmaps).fetch_add(1, std::memory_order_relaxed);
    (mapped ? slot_.map_ns : slot_.unmap_ns).fetch_add(took, std::memory_order_relaxed);
    if (hooks_.took) hooks_.took(mapped, took);
}

void Rank::answer(std::uint32_t page, std::uint32_t generation, So so) noexcept {
    table_->so(options_.rank, page).store(Answer{generation, so}.pack(), std::memory_order_release);
}

void Rank::note_failure(const std::string &text) noexcept {
    const std::scoped_lock lock(failure_mutex_);
    std::strncpy(slot_.error, text.c_str(), sizeof(slot_.error) - 1);
    slot_.error[sizeof(slot_.error) - 1] = '\0';
    slot_.failures.fetch_add(1, std::memory_order_release);
}

}  // namespace elastickv
