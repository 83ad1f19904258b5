// Fault points: named places in the core where a test can kill the process, delay it, or make a step fail.
//
// Off by default: a point costs one relaxed load. Points are set per process, by the process itself; a forked child
// inherits what its parent had set. Not for use outside tests, although compiled in: what is tested is what ships.
#pragma once

#include <atomic>
#include <cstdint>

namespace elastickv::fault {

enum class Action : std::uint8_t {
    fail,   // the point answers true once; the code there takes its failure path
    delay,  // sleeps `delay_us` at this pass and every later one
    kill,   // SIGKILL to the own process
};

inline constexpr int kMaxPoints = 16;

// Acts at pass number `after` + 1 of the point `name` (compared by text). Returns false when kMaxPoints are set.
bool set(const char *name, Action action, std::uint64_t after, std::uint64_t delay_us = 0) noexcept;
void clear() noexcept;
// How often the point was passed since it was set; 0 when it is not set.
std::uint64_t passes(const char *name) noexcept;

namespace detail {
extern std::atomic<bool> armed;
bool pass(const char *name) noexcept;
}  // namespace detail

// Marks a point. True: the step must fail. The name is a string literal, "part.step".
inline bool point(const char *name) noexcept {
    if (!detail::armed.load(std::memory_order_relaxed)) return false;
    return detail::pass(name);
}

}  // namespace elastickv::fault
