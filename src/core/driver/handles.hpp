// Owners of what a driver gives: each destructor is the inverse driver call, so undoing is leaving the scope.
//
// Move-only; a moved-from handle owns nothing. One handle must not be used from two threads at once. A destructor whose
// call fails cannot report it, so it counts it: leaked_calls() is zero in a healthy process.
//
// A Mapping must go before the Physical and the Reservation it joins. In a struct, declare it last; and do not
// move-assign over such a struct while it owns something, for that goes through the members in the other order.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "base/status.hpp"
#include "driver/driver.hpp"

namespace elastickv {

namespace detail {
inline std::atomic<std::uint64_t> leaked_call_count{0};
inline void count_leak(const Status &status) noexcept {
    if (!status.ok()) leaked_call_count.fetch_add(1, std::memory_order_relaxed);
}
}  // namespace detail

// How many inverse calls of destructors have failed in this process so far.
inline std::uint64_t leaked_calls() noexcept { return detail::leaked_call_count.load(std::memory_order_relaxed); }

// A reserved range of addresses.
class Reservation {
  public:
    static Result<Reservation> make(std::shared_ptr<Driver> driver, std::uint64_t bytes) noexcept {
        Result<Address> address = driver->reserve(bytes);
        if (!address.ok()) return address.status();
        return Reservation(std::move(driver), *address, bytes);
    }
    Reservation() noexcept = default;
    Reservation(Reservation &&other) noexcept
        : driver_(std::move(other.driver_)),
          address_(std::exchange(other.address_, 0)),
          bytes_(std::exchange(other.bytes_, 0)) {}
    Reservation &operator=(Reservation &&other) noexcept {
        Reservation taken(std::move(other));
        swap(taken);
        return *this;
    }
    ~Reservation() { detail::count_leak(close()); }

    Address address() const noexcept { return address_; }
    std::uint64_t bytes() const noexcept { return bytes_; }
    explicit operator bool() const noexcept { return driver_ != nullptr; }
    const std::shared_ptr<Driver> &driver() const noexcept { return driver_; }

    // Gives it back now and says how that went. Owns nothing afterwards, whatever the outcome.
    Status close() noexcept {
        const std::shared_ptr<Driver> driver = std::exchange(driver_, nullptr);
        return driver ? driver->free_address(address_, bytes_) : Status();
    }

  private:
    Reservation(std::shared_ptr<Driver> driver, Address address, std::uint64_t bytes) noexcept
        : driver_(std::move(driver)), address_(address), bytes_(bytes) {}
    void swap(Reservation &other) noexcept {
        std::swap(driver_, other.driver_);
        std::swap(address_, other.address_);
        std::swap(bytes_, other.bytes_);
    }

    std::shared_ptr<Driver> driver_;
    Address address_ = 0;
    std::uint64_t bytes_ = 0;
};

// Memory with no address.
class Physical {
  public:
    static Result<Physical> make(std::shared_ptr<Driver> driver, std::uint64_t bytes) noexcept {
        Result<PhysicalId> id = driver->create(bytes);
        if (!id.ok()) return id.status();
        return Physical(std::move(driver), *id, bytes);
    }
    Physical() noexcept = default;
    Physical(Physical &&other) noexcept
        : driver_(std::move(other.driver_)), id_(std::exchange(other.id_, 0)), bytes_(std::exchange(other.bytes_, 0)) {}
    Physical &operator=(Physical &&other) noexcept {
        Physical taken(std::move(other));
        swap(taken);
        return *this;
    }
    ~Physical() { detail::count_leak(close()); }

    PhysicalId id() const noexcept { return id_; }
    std::uint64_t bytes() const noexcept { return bytes_; }
    explicit operator bool() const noexcept { return driver_ != nullptr; }
    const std::shared_ptr<Driver> &driver() const noexcept { return driver_; }

    // Releases it now and says how that went. Owns nothing afterwards, whatever the outcome.
    Status close() noexcept {
        Status status = try_close();
        driver_.reset();
        return status;
    }
    // The same, but still owns it where the driver refuses.
    Status try_close() noexcept {
        if (!driver_) return {};
        Status status = driver_->release(id_);
        if (status.ok()) driver_.reset();
        return status;
    }

  private:
    Physical(std::shared_ptr<Driver> driver, PhysicalId id, std::uint64_t bytes) noexcept
        : driver_(std::move(driver)), id_(id), bytes_(bytes) {}
    void swap(Physical &other) noexcept {
        std::swap(driver_, other.driver_);
        std::swap(id_, other.id_);
        std::swap(bytes_, other.bytes_);
    }

    std::shared_ptr<Driver> driver_;
    PhysicalId id_ = 0;
    std::uint64_t bytes_ = 0;
};

// Memory behind addresses, readable and writable. Must go before the Physical and the Reservation it joins.
class Mapping {
  public:
    // Maps and gives access; when the second fails the first is undone (an undo that fails counts as a leaked call).
    // With `clearing` it does not wait until fresh memory is cleared: see Driver::open_access().
    static Result<Mapping> make(std::shared_ptr<Driver> driver, Address address, std::uint64_t bytes, PhysicalId id,
                                std::unique_ptr<Fence> *clearing = nullptr) noexcept {
        if (Status status = driver->map(address, bytes, id); !status.ok()) return status;
        Mapping mapping(std::move(driver), address, bytes);
        const Status status = clearing == nullptr ? mapping.driver_->set_access(address, bytes)
                                                  : mapping.driver_->open_access(address, bytes, clearing);
        if (!status.ok()) return status;
        return mapping;
    }
    Mapping() noexcept = default;
    Mapping(Mapping &&other) noexcept
        : driver_(std::move(other.driver_)),
          address_(std::exchange(other.address_, 0)),
          bytes_(std::exchange(other.bytes_, 0)) {}
    Mapping &operator=(Mapping &&other) noexcept {
        Mapping taken(std::move(other));
        swap(taken);
        return *this;
    }
    ~Mapping() { detail::count_leak(close()); }

    Address address() const noexcept { return address_; }
    std::uint64_t bytes() const noexcept { return bytes_; }
    explicit operator bool() const noexcept { return driver_ != nullptr; }

    // Unmaps now and says how that went. Owns nothing afterwards, whatever the outcome.
    Status close() noexcept {
        Status status = try_close();
        driver_.reset();
        return status;
    }
    // The same, but still owns it where the driver refuses.
    Status try_close() noexcept {
        if (!driver_) return {};
        Status status = driver_->unmap(address_, bytes_);
        if (status.ok()) driver_.reset();
        return status;
    }

  private:
    Mapping(std::shared_ptr<Driver> driver, Address address, std::uint64_t bytes) noexcept
        : driver_(std::move(driver)), address_(address), bytes_(bytes) {}
    void swap(Mapping &other) noexcept {
        std::swap(driver_, other.driver_);
        std::swap(address_, other.address_);
        std::swap(bytes_, other.bytes_);
    }

    std::shared_ptr<Driver> driver_;
    Address address_ = 0;
    std::uint64_t bytes_ = 0;
};

}  // namespace elastickv
