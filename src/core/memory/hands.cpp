#include "memory/hands.hpp"

#include <utility>

#include "base/futex.hpp"

namespace elastickv {
namespace {

constexpr std::uint64_t kLookUs = 100'000;  // at `stop_` at least this often, and at a last page whose bell was missed

}  // namespace

Hands::Hands(std::function<bool()> begin, std::function<void(std::uint32_t)> work)
    : begin_(std::move(begin)), work_(std::move(work)) {
    thread_ = std::thread([this] { help(); });
}

Hands::~Hands() {
    if (!thread_.joinable()) return;
    stop_.store(true, std::memory_order_release);
    futex_ring(bell_);
    thread_.join();
}

void Hands::abandon() noexcept {
    if (thread_.joinable()) thread_.detach();
}

void Hands::share(std::span<const std::uint32_t> pages, const std::function<void(std::uint32_t)> &own) noexcept {
    const std::uint64_t round = (next_.load(std::memory_order_relaxed) / kRound + 1) * kRound;
    pages_.store(pages.data(), std::memory_order_relaxed);
    count_.store(pages.size(), std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    next_.store(round, std::memory_order_release);
    futex_ring(bell_);
    std::size_t at = 0;
    while (take(&at)) {
        own(pages[at]);
        finished();
    }
    next_.store(round + kClosed, std::memory_order_release);
    for (;;) {  // ends with the driver calls that the helper is in, as the caller's own do
        const std::uint32_t done = done_.load(std::memory_order_acquire);
        if (done == pages.size()) return;
        futex_wait(done_, done, kLookUs);
    }
}

// The next page that nobody has taken yet.
bool Hands::take(std::size_t *at) noexcept {
    std::uint64_t seen = next_.load(std::memory_order_acquire);
    for (;;) {
        const std::uint64_t place = seen % kRound;
        if (place == kClosed || place >= count_.load(std::memory_order_relaxed)) return false;
        if (next_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
            *at = place;
            return true;
        }
    }
}

void Hands::finished() noexcept {
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_.load(std::memory_order_relaxed))
        futex_wake_all(done_);
}

void Hands::help() noexcept {
    bool begun = false;
    while (!stop_.load(std::memory_order_acquire)) {
        const std::uint32_t seen = bell_.load(std::memory_order_acquire);
        begun = begun || begin_();
        std::size_t at = 0;
        while (begun && take(&at)) {
            work_(pages_.load(std::memory_order_relaxed)[at]);
            finished();
        }
        futex_wait(bell_, seen, kLookUs);
    }
}

}  // namespace elastickv
