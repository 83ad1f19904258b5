// What the mapper waits for: fences of the engine's streams, and memory that others of its process give up.
#include <algorithm>

#include "base/faultpoint.hpp"
#include "base/futex.hpp"
#include "memory/rank.hpp"

namespace elastickv {
namespace {

constexpr std::uint64_t kIdleWaitUs = 100'000;  // looks at `stop` at least this often
constexpr std::uint64_t kFenceRetryNs = 5'000'000;
constexpr std::uint64_t kReclaimEveryNs =
    1'000'000'000;  // whoever drops its cache needs it again: not at every mapping

}  // namespace

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

}  // namespace elastickv
