// A second thread that takes part in the mapper's larger orders.
//
// On an H100 two threads of one process get 1.6 times as many mapping calls done as one, and four no more than two
// (measured 2026-11-23, driver 580.159.04), so there is one helper and not more.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <thread>

namespace elastickv {

class Hands {
  public:
    // `begin()` is asked by the helper until it says true, before its first work; `work(page)` is what it then does.
    // Both may not throw.
    Hands(std::function<bool()> begin, std::function<void(std::uint32_t)> work);
    ~Hands();
    Hands(const Hands &) = delete;
    Hands &operator=(const Hands &) = delete;

    // Each page once, by the caller through `own` or by the helper; returns when all are done. One caller at a time.
    void share(std::span<const std::uint32_t> pages, const std::function<void(std::uint32_t)> &own) noexcept;
    // The helper did not come along with a fork.
    void abandon() noexcept;

  private:
    void help() noexcept;
    bool take(std::size_t *at) noexcept;
    void finished() noexcept;

    static constexpr std::uint64_t kRound = std::uint64_t{1} << 32;
    static constexpr std::uint64_t kClosed = kRound - 1;

    const std::function<bool()> begin_;
    const std::function<void(std::uint32_t)> work_;
    // The round in the upper half, the next page's place in the lower one, or kClosed. Whoever moves it on has taken
    // that page, and the round cannot end before it is done: what follows stands still until then.
    std::atomic<std::uint64_t> next_{kClosed};
    std::atomic<const std::uint32_t *> pages_{nullptr};
    std::atomic<std::size_t> count_{0};
    std::atomic<std::uint32_t> done_{0};
    std::atomic<std::uint32_t> bell_{0};
    std::atomic<bool> stop_{false};
    std::thread thread_;
};

}  // namespace elastickv
