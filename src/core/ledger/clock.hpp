// The one clock of the ledger: CLOCK_MONOTONIC, which all processes of a machine share and nobody can set.
#pragma once

#include <time.h>

#include <cstdint>

#include "base/futex.hpp"

namespace elastickv::ledger {

inline std::uint64_t now_ns() noexcept { return monotonic_ns(); }
inline std::uint64_t unix_ns() noexcept {
    timespec now{};
    clock_gettime(CLOCK_REALTIME, &now);
    return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000U + static_cast<std::uint64_t>(now.tv_nsec);
}
inline timespec to_timespec(std::uint64_t ns) noexcept {
    return {static_cast<time_t>(ns / 1'000'000'000U), static_cast<long>(ns % 1'000'000'000U)};
}

}  // namespace elastickv::ledger
