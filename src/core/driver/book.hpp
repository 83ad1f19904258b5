// The book: what a driver has reserved, created and mapped, and the one place where arguments are checked.
//
// Shared by the host and the CUDA driver, so that both refuse the same mistakes with the same texts. Every change is
// made in two steps, begin and end, around the system call, and the lock is held in neither of them while a system
// call runs. An entry that another call is working on is refused, so two racing calls on one range cannot both pass.
// All sizes and addresses are bytes. Thread-safe. Each call is O(log n), except those over a range of k mappings: O(k +
// log n).
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/status.hpp"
#include "driver/driver.hpp"

namespace elastickv {

class Book {
  public:
    // What stands behind a PhysicalId: the driver's own key (a file offset, a CUDA handle).
    struct Memory {
        std::uint64_t bytes = 0;
        std::uint64_t key = 0;
        std::uint32_t mappings = 0;
        bool cleared = false;  // its old contents have been overwritten with zeros
    };

    explicit Book(std::uint64_t granularity) : granularity_(granularity) {}

    // invalid unless bytes is a positive multiple of the granularity.
    Status check_size(const char *call, std::uint64_t bytes) const;

    Status add_reservation(Address address, std::uint64_t bytes);
    // Strikes a reservation out. invalid: not exactly one, or something is still mapped in it.
    Status take_reservation(Address address, std::uint64_t bytes);

    Result<PhysicalId> add_memory(std::uint64_t bytes, std::uint64_t key, bool cleared);
    // Strikes an id out and returns what stood behind it. invalid: unknown, or still mapped.
    Result<Memory> take_memory(PhysicalId id);
    // Puts a struck-out id back, after the driver's release failed.
    Status put_back(PhysicalId id, const Memory &memory);

    // Returns the key of `id` and holds the range for this call; end_map() makes it a mapping or forgets it.
    Result<std::uint64_t> begin_map(Address address, std::uint64_t bytes, PhysicalId id);
    void end_map(Address address, bool mapped);

    // The range must be tiled exactly by whole mappings. Returns true in `fresh` if any memory in it is not cleared.
    Status begin_access(Address address, std::uint64_t bytes, bool *fresh);
    void end_access(Address address, std::uint64_t bytes, bool cleared);

    // The range must be exactly what one begin_map() named.
    Status begin_unmap(Address address, std::uint64_t bytes);
    void end_unmap(Address address, bool unmapped);

    // Everything still held, for a driver that is being destroyed: what was never given back, or could not be.
    struct Remains {
        std::vector<std::pair<Address, std::uint64_t>> mappings, reservations;
        std::vector<std::uint64_t> keys;  // of memory
        bool empty() const noexcept { return mappings.empty() && reservations.empty() && keys.empty(); }
    };
    Remains remains() const;

    DriverStats stats() const;
    std::uint64_t created_bytes() const;

    // Around fork(): nothing may be half changed in the child. forget() empties the book there, and returns how many
    // mappings it had.
    void lock() const { mutex_.lock(); }
    void unlock() const { mutex_.unlock(); }
    std::uint64_t forget();  // requires lock()

  private:
    struct Mapping {
        std::uint64_t bytes = 0;
        PhysicalId id = 0;
        bool busy = false;
    };
    using Mappings = std::map<Address, Mapping>;

    Status check_range(const char *call, Address address, std::uint64_t bytes) const;
    Status check_free(Address address, std::uint64_t bytes) const;
    void drop_mapping(Mappings::iterator mapping);

    const std::uint64_t granularity_;
    mutable std::mutex mutex_;
    std::map<Address, std::uint64_t> reservations_;
    Mappings mappings_;
    std::unordered_map<PhysicalId, Memory> memory_;
    PhysicalId next_id_ = 1;  // never used twice, so a stale id is always recognised
    DriverStats stats_;
};

}  // namespace elastickv
