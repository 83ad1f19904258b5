#include "base/faultpoint.hpp"

#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <cstring>

namespace elastickv::fault {

namespace detail {
std::atomic<bool> armed{false};
}  // namespace detail

namespace {

constexpr std::size_t kNameBytes = 64;

// A point is in use once `ready` is set; the fields before it do not change until clear().
struct Point {
    std::atomic<bool> ready{false};
    std::array<char, kNameBytes> name{};
    Action action = Action::fail;
    std::uint64_t after = 0;
    std::uint64_t delay_us = 0;
    std::atomic<std::uint64_t> passed{0};
};
std::array<Point, kMaxPoints> points;
std::atomic<int> used{0};

Point *find(const char *name) noexcept {
    const int count = used.load(std::memory_order_acquire);
    for (int i = 0; i < count && i < kMaxPoints; ++i) {
        Point &point = points[static_cast<std::size_t>(i)];
        if (point.ready.load(std::memory_order_acquire) && std::strcmp(point.name.data(), name) == 0) return &point;
    }
    return nullptr;
}

void sleep_us(std::uint64_t us) noexcept {
    timespec left{static_cast<time_t>(us / 1000000), static_cast<long>(us % 1000000 * 1000)};
    while (nanosleep(&left, &left) != 0) {
    }
}

}  // namespace

bool set(const char *name, Action action, std::uint64_t after, std::uint64_t delay_us) noexcept {
    const int index = used.fetch_add(1, std::memory_order_acq_rel);
    if (index >= kMaxPoints || std::strlen(name) >= kNameBytes) return false;
    Point &point = points[static_cast<std::size_t>(index)];
    std::strcpy(point.name.data(), name);
    point.action = action;
    point.after = after;
    point.delay_us = delay_us;
    point.passed.store(0, std::memory_order_relaxed);
    point.ready.store(true, std::memory_order_release);
    detail::armed.store(true, std::memory_order_release);
    return true;
}

void clear() noexcept {
    detail::armed.store(false, std::memory_order_release);
    for (Point &point : points) point.ready.store(false, std::memory_order_release);
    used.store(0, std::memory_order_release);
}

std::uint64_t passes(const char *name) noexcept {
    const Point *point = find(name);
    return point == nullptr ? 0 : point->passed.load(std::memory_order_relaxed);
}

bool detail::pass(const char *name) noexcept {
    Point *point = find(name);
    if (point == nullptr) return false;
    const std::uint64_t number = point->passed.fetch_add(1, std::memory_order_relaxed);
    switch (point->action) {
        case Action::fail: return number == point->after;
        case Action::delay:
            if (number >= point->after) sleep_us(point->delay_us);
            return false;
        case Action::kill:
            if (number == point->after) kill(getpid(), SIGKILL);
            return false;
    }
    return false;
}

}  // namespace elastickv::fault
