#include "memory/rank.hpp"

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
    rank->start();
    return rank;
}

Rank::Rank(std::shared_ptr<Driver> driver, std::shared_ptr<PageTable> table, const RankOptions &options,
           RankHooks hooks)
    : driver_(std::move(driver)),
      table_(std::move(table)),
      options_(options),
      hooks_(std::move(hooks)),
      slot_(table_->rank(options_.rank)),
      collected_in_(table_->pages()) {}

Rank::~Rank() { close(); }

void Rank::start() {
    const std::uint32_t hands = options_.hands != 0 ? options_.hands : driver_->on_cpu() ? 1 : 2;
    if (hands > 1)
        hands_ = std::make_unique<Hands>([this] { return bind(); },
                                         [this](std::uint32_t page) { look_at(page, Hand::helper); });
    thread_ = std::thread([this] { run(); });
}

void Rank::close() noexcept {
    if (!thread_.joinable()) return;
    if (origin_.elsewhere()) {  // the mapper did not come along with the fork, and the memory is the parent's
        thread_.detach();
        if (hands_) hands_->abandon();
        return;
    }
    stop_.store(true, std::memory_order_release);
    table_->ring_ranks();
    thread_.join();
    slot_.state.store(static_cast<std::uint32_t>(RankState::gone), std::memory_order_release);
    futex_ring(table_->header().answer_bell);
}

std::uint64_t Rank::mapped_bytes() const noexcept { return slot_.mapped_bytes.load(std::memory_order_relaxed); }

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
        // From here on the mapper is alone: the helper has work within work_on_collected() only.
        if (!clearing_.empty() && monotonic_ns() - clearing_.front().since_ns < kSpinNs) {
            std::this_thread::yield();
            continue;
        }
        futex_wait(header.order_bell, seen, fences_pending || !clearing_.empty() ? kFencePollUs : kIdleWaitUs);
    }
    hands_.reset();
    for (Clearing &one : clearing_) wait_cleared(one.fences);
    clearing_.clear();
    std::int64_t freed = 0;
    for (auto &[page, extent] : extents_) {
        freed += static_cast<std::int64_t>(extent_bytes(extent.pages));
        if (const Status status = take_down(extent); !status.ok()) note_failure(status.message());
    }
    extents_.clear();
    slot_.mapped_bytes.store(0, std::memory_order_relaxed);
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
        for (std::uint32_t page = 0; page < header.pages; ++page) collect(page);
    }
    for (; cursor_ != tail; ++cursor_) collect(table_->ring_at(cursor_));
    work_on_collected();
    return true;
}

void Rank::collect(std::uint32_t page) noexcept {
    if (page >= table_->pages() || collected_in_[page] == collection_) return;
    collected_in_[page] = collection_;
    collected_.push_back(page);
}

void Rank::work_on_collected() noexcept {
    const auto own = [this](std::uint32_t page) {
        look_at(page, Hand::mapper);
        poll_clearing();  // while this extent is being cleared, the next one is mapped
    };
    if (hands_ && collected_.size() >= options_.share_from)
        hands_->share(collected_, own);
    else
        for (const std::uint32_t page : collected_) own(page);
    for (const std::uint32_t page : again_) own(page);
    again_.clear();
    collected_.clear();
    if (++collection_ == 0) ++collection_;
}

bool Rank::being_cleared(std::uint32_t page, std::uint32_t generation) const noexcept {
    const std::scoped_lock lock(hands_mutex_);
    return std::any_of(clearing_.begin(), clearing_.end(),
                       [&](const Clearing &one) { return one.page == page && one.generation == generation; });
}

// Answers extents whose memory has been cleared, in the order of their clearing; true when there were any. By the
// mapper; the helper may add to the end meanwhile, which leaves the first one where it is.
bool Rank::poll_clearing() noexcept {
    bool worked = false;
    for (;;) {
        Clearing *one = nullptr;
        {
            const std::scoped_lock lock(hands_mutex_);
            if (!clearing_.empty()) one = &clearing_.front();
        }
        if (one == nullptr) return worked;
        while (!one->fences.empty()) {
            const Result<bool> done = one->fences.back()->done();
            if (!done.ok()) note_failure(done.status().message());
            if (!done.ok() || !done.value()) return worked;  // never answered: nobody may use what may not be zero
            one->fences.pop_back();
        }
        answer(one->page, one->generation, So::mapped);
        const std::scoped_lock lock(hands_mutex_);
        clearing_.pop_front();
        worked = true;
    }
}

// Before memory is taken away again; a device that does not answer within the deadline keeps it.
void Rank::wait_cleared(std::vector<std::unique_ptr<Fence>> &fences) const noexcept {
    const std::uint64_t until = monotonic_ns() + options_.deadline_ms * 1'000'000U;
    for (const auto &fence : fences) {
        for (;;) {
            const Result<bool> done = fence->done();
            if (!done.ok() || done.value() || monotonic_ns() >= until) break;
            std::this_thread::yield();
        }
    }
}

void Rank::look_at(std::uint32_t page, Hand hand) noexcept {
    const auto wanted = Wanted::unpack(table_->wanted(page).load(std::memory_order_acquire));
    const auto so = Answer::unpack(table_->so(options_.rank, page).load(std::memory_order_relaxed));
    if (wanted.generation == 0 || so.generation == wanted.generation) return;
    if (wanted.map && wanted.recall) {
        recall_extent(page, wanted);
        return;
    }
    if (wanted.map) {
        if (!being_cleared(page, wanted.generation)) map_extent(page, wanted, hand);
        return;
    }
    const std::uint64_t ticket = table_->ticket(page).load(std::memory_order_relaxed);
    if (wanted.fenced && slot_.fence_passed.load(std::memory_order_relaxed) < ticket) {
        const std::scoped_lock lock(hands_mutex_);
        waiting_.push_back(page);
    } else {
        unmap_extent(page, wanted);
    }
}

bool Rank::retry_waiting() noexcept {
    const std::uint64_t passed = slot_.fence_passed.load(std::memory_order_relaxed);
    std::erase_if(waiting_, [&](std::uint32_t page) {
        const bool due = table_->ticket(page).load(std::memory_order_relaxed) <= passed;
        if (due) collect(page);
        return due;
    });
    if (collected_.empty()) return false;
    work_on_collected();
    return true;
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
    {
        const std::scoped_lock lock(hands_mutex_);
        extents_.emplace(page, std::move(extent));
    }
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
    wait_cleared(clearing);
    clearing.clear();
    *undone = take_down(extent).ok();
    return status;
}

Rank::Extent *Rank::extent_at(std::uint32_t page) noexcept {
    const std::scoped_lock lock(hands_mutex_);
    const auto found = extents_.find(page);
    return found == extents_.end() ? nullptr : &found->second;
}

void Rank::map_extent(std::uint32_t page, const Wanted &wanted, Hand hand) noexcept {
    const std::uint64_t start = monotonic_ns();
    Extent extent;
    extent.pages = wanted.pages;
    std::vector<std::unique_ptr<Fence>> clearing;
    Status status;
    bool undone = true;
    if (extent_at(page) != nullptr)
        status = {Code::invalid, "page " + std::to_string(page) + " was ordered mapped twice"};
    else if (page + std::uint64_t{wanted.pages} > table_->pages() || wanted.pages == 0)
        status = {Code::invalid, "an extent of " + std::to_string(wanted.pages) + " pages at page " +
                                     std::to_string(page) + " leaves the table"};
    else
        status = map_or_undo(page, extent, clearing, &undone);
    if (status.code() == Code::out_of_memory && undone && hand == Hand::helper &&
        reclaim_offered_.load(std::memory_order_acquire)) {
        const std::scoped_lock lock(hands_mutex_);
        again_.push_back(page);  // asking for memory, and waiting for it, is the mapper's
        return;
    }
    if (status.code() == Code::out_of_memory && undone && hand == Hand::mapper && reclaim())
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
        const std::scoped_lock lock(hands_mutex_);
        clearing_.push_back({page, wanted.generation, monotonic_ns(), std::move(clearing)});
        return;
    }
    answer(page, wanted.generation, So::mapped);
    (void)fault::point("memory.map.answered");
}

void Rank::unmap_extent(std::uint32_t page, const Wanted &wanted) noexcept {
    const std::uint64_t start = monotonic_ns();
    const std::uint64_t bytes = extent_bytes(wanted.pages);
    if (Extent *const extent = extent_at(page); extent != nullptr) {
        const Status status = fault::point("memory.unmap.begin")
                                  ? Status{Code::driver, "injected: the driver does not let go"}
                                  : take_down(*extent);
        if (!status.ok()) {
            extent->torn = true;
            // The driver would not let go: the page keeps its lease and is never used again.
            note_failure(status.message());
            answer(page, wanted.generation, So::stuck);
            return;
        }
        {
            const std::scoped_lock lock(hands_mutex_);
            extents_.erase(page);
        }
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
    const Extent *const extent = extent_at(page);
    const bool whole =
        extent != nullptr && extent->pages == wanted.pages && !extent->torn && !fault::point("memory.recall.begin");
    {
        const std::scoped_lock lock(hands_mutex_);
        std::erase(waiting_, page);
    }
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
