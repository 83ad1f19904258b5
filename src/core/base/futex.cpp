#include "base/futex.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace elastickv {

std::uint64_t monotonic_ns() noexcept {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000U + static_cast<std::uint64_t>(now.tv_nsec);
}

std::uint64_t coarse_ns() noexcept {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000U + static_cast<std::uint64_t>(now.tv_nsec);
}

void futex_wait(const std::atomic<std::uint32_t> &word, std::uint32_t seen, std::uint64_t timeout_us) noexcept {
    timespec timeout{};
    timeout.tv_sec = static_cast<time_t>(timeout_us / 1'000'000U);
    timeout.tv_nsec = static_cast<long>(timeout_us % 1'000'000U) * 1000;
    syscall(SYS_futex, &word, FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<std::uint32_t> &word) noexcept {
    syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void futex_ring(std::atomic<std::uint32_t> &word) noexcept {
    word.fetch_add(1, std::memory_order_release);
    futex_wake_all(word);
}

}  // namespace elastickv
