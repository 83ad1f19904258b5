// Fault points: named places in the core where a test can kill the process, stop it, delay it, or make a step fail.
//
// Off by default: a point costs one relaxed load. Points are set per process, by the process itself; a forked child
// inherits what its parent had set. Not for use outside tests, although compiled in: what is tested is what ships.
#pragma once

#include <atomic>
#include <cstdint>

#include "base/faultlist.hpp"

namespace elastickv::fault {

enum class Action : std::uint8_t {
    fail,   // the point answers true once; the code there takes its failure path
    delay,  // sleeps `delay_us` at this pass and every later one
    kill,   // SIGKILL to the own process
    stop,   // SIGSTOP to the own process, once
};

enum class Setting : std::uint8_t { done, unknown, cannot_fail };

// Acts at pass number `after` + 1 of the point `name`; replaces what was set there.
Setting set(std::string_view name, Action action, std::uint64_t after, std::uint64_t delay_us = 0) noexcept;
void clear() noexcept;
// How often the point was passed since it was set; 0 when it is not set.
std::uint64_t passes(std::string_view name) noexcept;

// A name of the list, looked up by the compiler.
struct Point {
    std::size_t index;
    consteval Point(const char *name) : index(find_point(name)) {  // NOLINT(google-explicit-constructor)
        if (index == kPoints.size()) throw "this fault point is not in base/faultlist.hpp";
    }
};

namespace detail {
extern std::atomic<bool> armed;
bool pass(std::size_t index) noexcept;
}  // namespace detail

// Marks a point. True: the step must fail; never true where the list says that it cannot.
inline bool point(Point at) noexcept {
    if (!detail::armed.load(std::memory_order_relaxed)) return false;
    return detail::pass(at.index);
}

}  // namespace elastickv::fault
