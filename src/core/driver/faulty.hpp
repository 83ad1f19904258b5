// A driver around a driver that fails or delays chosen calls, for tests of everything that stands on a driver.
//
// A call that is made to fail is not passed on, so nothing has changed. Numbers count from the moment of the order: the
// next call of that kind is number 1. Delays sleep in the calling thread. Thread-safe.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "base/status.hpp"
#include "driver/driver.hpp"

namespace elastickv {

enum class Call : std::uint8_t { reserve, free_address, create, release, map, set_access, unmap, memory_info, record };
inline constexpr std::size_t kCallKinds = 9;

const char *call_name(Call call) noexcept;
Result<Call> call_from_name(const std::string &name);  // invalid: the text lists the names

class FaultyDriver final : public Driver {
  public:
    using Counts = std::array<std::uint64_t, kCallKinds>;  // by Call; failed calls included

    explicit FaultyDriver(std::shared_ptr<Driver> inner) : inner_(std::move(inner)) {}

    // The nth call from now fails with `status`. Several orders may stand at once.
    void fail(Call call, std::uint64_t nth, Status status);
    // Every kth call from now fails, with out_of_memory for create and driver for the others; 0 ends it.
    void fail_every(Call call, std::uint64_t k);
    // The nth call from now sleeps first; nth = 0: every call does (0 microseconds ends that).
    void delay(Call call, std::uint64_t nth, std::uint64_t microseconds);
    // Takes back all orders of fail, fail_every and delay. Counts stay.
    void heal();
    Counts counts() const;

    // While on, record() gives fences that are done when complete_fences() says so, and not before.
    void manual_fences(bool on);
    std::uint64_t pending_fences() const;
    // Completes the oldest `count` pending fences; returns how many there were to complete.
    std::uint64_t complete_fences(std::uint64_t count = ~std::uint64_t{0});
    // From now on done() of every manual fence fails with this status; ok ends it.
    void fail_fences(Status status);

    const std::shared_ptr<Driver> &inner() const noexcept { return inner_; }

    std::string name() const override { return inner_->name(); }
    std::string device_id() const override { return inner_->device_id(); }
    std::uint64_t granularity() const noexcept override { return inner_->granularity(); }
    Result<Address> reserve(std::uint64_t bytes) noexcept override;
    Status free_address(Address address, std::uint64_t bytes) noexcept override;
    Result<PhysicalId> create(std::uint64_t bytes) noexcept override;
    Status release(PhysicalId id) noexcept override;
    Status map(Address address, std::uint64_t bytes, PhysicalId id) noexcept override;
    Status set_access(Address address, std::uint64_t bytes) noexcept override;
    Status unmap(Address address, std::uint64_t bytes) noexcept override;
    Result<MemoryInfo> memory_info() noexcept override;
    DriverStats stats() const noexcept override { return inner_->stats(); }
    Status bind_thread() noexcept override { return inner_->bind_thread(); }
    Result<std::unique_ptr<Fence>> record(std::uint64_t stream) noexcept override;
    bool on_cpu() const noexcept override { return inner_->on_cpu(); }
    int ordinal() const noexcept override { return inner_->ordinal(); }

  private:
    struct FenceState;
    class ManualFence;
    // All numbers are of the kind's own count.
    struct Orders {
        std::uint64_t count = 0;
        std::map<std::uint64_t, Status> failures;
        std::map<std::uint64_t, std::uint64_t> delays;  // microseconds
        std::uint64_t every = 0;
        std::uint64_t every_since = 0;
        std::uint64_t every_delay = 0;
    };

    Status before(Call call);

    const std::shared_ptr<Driver> inner_;
    mutable std::mutex mutex_;
    std::array<Orders, kCallKinds> orders_;
    bool manual_fences_ = false;
    std::deque<std::shared_ptr<FenceState>> pending_;
    std::shared_ptr<Status> fence_failure_;
};

}  // namespace elastickv
