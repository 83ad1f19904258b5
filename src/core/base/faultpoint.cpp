#include "base/faultpoint.hpp"

#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <array>

namespace elastickv::fault {

namespace detail {
std::atomic<bool> armed{false};
}  // namespace detail

namespace {

// In use once `ready` is set; the fields before it change only while it is not.
struct Order {
    std::atomic<bool> ready{false};
    std::atomic<Action> action{Action::fail};
    std::atomic<std::uint64_t> after{0}, delay_us{0}, passed{0};
};
std::array<Order, kPoints.size()> orders;

void sleep_us(std::uint64_t us) noexcept {
    timespec left{static_cast<time_t>(us / 1000000), static_cast<long>(us % 1000000 * 1000)};
    while (nanosleep(&left, &left) != 0) {
    }
}

}  // namespace

Setting set(std::string_view name, Action action, std::uint64_t after, std::uint64_t delay_us) noexcept {
    const std::size_t index = find_point(name);
    if (index == kPoints.size()) return Setting::unknown;
    if (action == Action::fail && !kPoints.at(index).can_fail) return Setting::cannot_fail;
    Order &order = orders.at(index);
    order.ready.store(false, std::memory_order_release);
    order.action.store(action, std::memory_order_relaxed);
    order.after.store(after, std::memory_order_relaxed);
    order.delay_us.store(delay_us, std::memory_order_relaxed);
    order.passed.store(0, std::memory_order_relaxed);
    order.ready.store(true, std::memory_order_release);
    detail::armed.store(true, std::memory_order_release);
    return Setting::done;
}

void clear() noexcept {
    detail::armed.store(false, std::memory_order_release);
    for (Order &order : orders) order.ready.store(false, std::memory_order_release);
}

std::uint64_t passes(std::string_view name) noexcept {
    const std::size_t index = find_point(name);
    if (index == kPoints.size() || !orders.at(index).ready.load(std::memory_order_acquire)) return 0;
    return orders.at(index).passed.load(std::memory_order_relaxed);
}

bool detail::pass(std::size_t index) noexcept {
    Order &order = orders.at(index);
    if (!order.ready.load(std::memory_order_acquire)) return false;
    const std::uint64_t number = order.passed.fetch_add(1, std::memory_order_relaxed);
    const std::uint64_t after = order.after.load(std::memory_order_relaxed);
    switch (order.action.load(std::memory_order_relaxed)) {
        case Action::fail: return number == after;
        case Action::delay:
            if (number >= after) sleep_us(order.delay_us.load(std::memory_order_relaxed));
            return false;
        case Action::kill:
            if (number == after) kill(getpid(), SIGKILL);
            return false;
        case Action::stop:
            if (number == after) kill(getpid(), SIGSTOP);
            return false;
    }
    return false;
}

}  // namespace elastickv::fault
