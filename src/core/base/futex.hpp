// Futex words in shared memory: wait until a word changes, wake the waiters. Never waits without a deadline.
#pragma once

#include <atomic>
#include <cstdint>

namespace elastickv {

std::uint64_t monotonic_ns() noexcept;
// The same clock, up to a few milliseconds behind and several times cheaper to read.
std::uint64_t coarse_ns() noexcept;

// Returns when `word` is no longer `seen`, on a wake, or after `timeout_us`; spurious returns are allowed.
void futex_wait(const std::atomic<std::uint32_t> &word, std::uint32_t seen, std::uint64_t timeout_us) noexcept;
void futex_wake_all(std::atomic<std::uint32_t> &word) noexcept;
// Changes the word and wakes: what every doorbell does.
void futex_ring(std::atomic<std::uint32_t> &word) noexcept;

}  // namespace elastickv
