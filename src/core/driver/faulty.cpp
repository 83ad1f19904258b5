#include "driver/faulty.hpp"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "driver/text.hpp"

namespace elastickv {

namespace {

constexpr std::array<const char *, kCallKinds> kNames = {"reserve",    "free_address", "create",      "release", "map",
                                                         "set_access", "unmap",        "memory_info", "record"};

std::size_t index(Call call) noexcept { return static_cast<std::size_t>(call); }

}  // namespace

const char *call_name(Call call) noexcept { return kNames.at(index(call)); }

Result<Call> call_from_name(const std::string &name) {
    std::string known;
    for (std::size_t i = 0; i < kNames.size(); ++i) {
        if (name == kNames.at(i)) return static_cast<Call>(i);
        known += (i == 0 ? "" : ", ") + std::string(kNames.at(i));
    }
    return Status(Code::invalid, "there is no driver call named '" + name + "'; the calls are " + known);
}

struct FaultyDriver::FenceState {
    std::atomic<bool> done{false};
    std::mutex mutex;
    Status failure;
};

class FaultyDriver::ManualFence final : public Fence {
  public:
    explicit ManualFence(std::shared_ptr<FenceState> state) : state_(std::move(state)) {}
    Result<bool> done() noexcept override {
        return no_throw([&]() -> Result<bool> {
            std::lock_guard guard(state_->mutex);
            if (!state_->failure.ok()) return state_->failure;
            return state_->done.load();
        });
    }

  private:
    std::shared_ptr<FenceState> state_;
};

void FaultyDriver::fail(Call call, std::uint64_t nth, Status status) {
    std::lock_guard guard(mutex_);
    Orders &orders = orders_.at(index(call));
    orders.failures.insert_or_assign(orders.count + std::max<std::uint64_t>(nth, 1), std::move(status));
}

void FaultyDriver::fail_every(Call call, std::uint64_t k) {
    std::lock_guard guard(mutex_);
    Orders &orders = orders_.at(index(call));
    orders.every = k;
    orders.every_since = orders.count;
}

void FaultyDriver::delay(Call call, std::uint64_t nth, std::uint64_t microseconds) {
    std::lock_guard guard(mutex_);
    Orders &orders = orders_.at(index(call));
    if (nth == 0) {
        orders.every_delay = microseconds;
    } else {
        orders.delays.insert_or_assign(orders.count + nth, microseconds);
    }
}

void FaultyDriver::heal() {
    std::lock_guard guard(mutex_);
    for (Orders &orders : orders_) {
        const std::uint64_t count = orders.count;
        orders = {};
        orders.count = count;
    }
}

FaultyDriver::Counts FaultyDriver::counts() const {
    std::lock_guard guard(mutex_);
    Counts counts{};
    for (std::size_t i = 0; i < counts.size(); ++i) counts.at(i) = orders_.at(i).count;
    return counts;
}

// Counts the call, sleeps where ordered, and returns what it shall fail with.
Status FaultyDriver::before(Call call) {
    Status result;
    std::uint64_t sleep = 0;
    {
        std::lock_guard guard(mutex_);
        Orders &orders = orders_.at(index(call));
        const std::uint64_t number = ++orders.count;
        sleep = orders.every_delay;
        if (auto found = orders.delays.find(number); found != orders.delays.end()) {
            sleep = found->second;
            orders.delays.erase(found);
        }
        if (orders.every != 0 && (number - orders.every_since) % orders.every == 0) {
            result = Status(call == Call::create ? Code::out_of_memory : Code::driver,
                            std::string("injected: every ") + std::to_string(orders.every) + "th " + call_name(call) +
                                " fails, this is call " + std::to_string(number));
        }
        if (auto found = orders.failures.find(number); found != orders.failures.end()) {
            result = std::move(found->second);
            orders.failures.erase(found);
        }
    }
    if (sleep != 0) std::this_thread::sleep_for(std::chrono::microseconds(sleep));
    return result;
}

void FaultyDriver::manual_fences(bool on) {
    std::lock_guard guard(mutex_);
    manual_fences_ = on;
}

std::uint64_t FaultyDriver::pending_fences() const {
    std::lock_guard guard(mutex_);
    return pending_.size();
}

std::uint64_t FaultyDriver::complete_fences(std::uint64_t count) {
    std::lock_guard guard(mutex_);
    std::uint64_t completed = 0;
    for (; completed < count && !pending_.empty(); ++completed) {
        pending_.front()->done = true;
        pending_.pop_front();
    }
    return completed;
}

void FaultyDriver::fail_fences(Status status) {
    std::lock_guard guard(mutex_);
    for (const auto &state : pending_) {
        std::lock_guard state_guard(state->mutex);
        state->failure = status;
    }
    fence_failure_ = status.ok() ? nullptr : std::make_shared<Status>(std::move(status));
}

Result<Address> FaultyDriver::reserve(std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Result<Address> {
        if (Status status = before(Call::reserve); !status.ok()) return status;
        return inner_->reserve(bytes);
    });
}

Status FaultyDriver::free_address(Address address, std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Status {
        if (Status status = before(Call::free_address); !status.ok()) return status;
        return inner_->free_address(address, bytes);
    });
}

Result<PhysicalId> FaultyDriver::create(std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Result<PhysicalId> {
        if (Status status = before(Call::create); !status.ok()) return status;
        return inner_->create(bytes);
    });
}

Status FaultyDriver::release(PhysicalId id) noexcept {
    return no_throw([&]() -> Status {
        if (Status status = before(Call::release); !status.ok()) return status;
        return inner_->release(id);
    });
}

Status FaultyDriver::map(Address address, std::uint64_t bytes, PhysicalId id) noexcept {
    return no_throw([&]() -> Status {
        if (Status status = before(Call::map); !status.ok()) return status;
        return inner_->map(address, bytes, id);
    });
}

Status FaultyDriver::set_access(Address address, std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Status {
        if (Status status = before(Call::set_access); !status.ok()) return status;
        return inner_->set_access(address, bytes);
    });
}

Status FaultyDriver::unmap(Address address, std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Status {
        if (Status status = before(Call::unmap); !status.ok()) return status;
        return inner_->unmap(address, bytes);
    });
}

Result<MemoryInfo> FaultyDriver::memory_info() noexcept {
    return no_throw([&]() -> Result<MemoryInfo> {
        if (Status status = before(Call::memory_info); !status.ok()) return status;
        return inner_->memory_info();
    });
}

Result<std::unique_ptr<Fence>> FaultyDriver::record(std::uint64_t stream) noexcept {
    return no_throw([&]() -> Result<std::unique_ptr<Fence>> {
        if (Status status = before(Call::record); !status.ok()) return status;
        std::lock_guard guard(mutex_);
        if (!manual_fences_) return inner_->record(stream);
        auto state = std::make_shared<FenceState>();
        if (fence_failure_) state->failure = *fence_failure_;
        pending_.push_back(state);
        return {std::make_unique<ManualFence>(std::move(state))};
    });
}

}  // namespace elastickv
