// The driver: the few calls that reserve addresses, make memory, and put one behind the other.
//
// Two implementations stand behind it: `host` (real pages of one memfd; an address with no page faults) and `cuda`
// (libcuda.so.1 found at run time). `FaultyDriver` wraps either one and fails or delays chosen calls. All sizes and
// addresses are bytes and must be multiples of granularity(). Every method may be called from any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.hpp"

namespace elastickv {

using Address = std::uint64_t;
using PhysicalId = std::uint64_t;

struct MemoryInfo {
    std::uint64_t free_bytes = 0;
    std::uint64_t total_bytes = 0;
};

// What a driver holds now. All zero once everything has been given back.
struct DriverStats {
    std::uint64_t reservations = 0;
    std::uint64_t reserved_bytes = 0;
    std::uint64_t physicals = 0;  // create() calls not yet released
    std::uint64_t created_bytes = 0;
    std::uint64_t mappings = 0;
    std::uint64_t mapped_bytes = 0;
    bool operator==(const DriverStats &) const = default;
};

// A point in a stream of device work. done() is true once everything enqueued before it has completed.
class Fence {
  public:
    virtual ~Fence() = default;
    virtual Result<bool> done() noexcept = 0;
};

class Driver {
  public:
    virtual ~Driver() = default;

    virtual std::string name() const = 0;                    // "host", "cuda"
    virtual std::string device_id() const = 0;               // "host", or the GPU's UUID ("GPU-…")
    virtual std::uint64_t granularity() const noexcept = 0;  // bytes; the page

    // Addresses only: no memory behind them. An access faults.
    virtual Result<Address> reserve(std::uint64_t bytes) noexcept = 0;
    virtual Status free_address(Address address, std::uint64_t bytes) noexcept = 0;

    // Memory only: no address. Reads as zero once mapped. out_of_memory when the device has none. release() of
    // memory that is mapped is invalid. One id may be mapped at several addresses.
    virtual Result<PhysicalId> create(std::uint64_t bytes) noexcept = 0;
    virtual Status release(PhysicalId id) noexcept = 0;

    // Puts the whole of `id` behind [address, address+bytes); no access yet. The range must be reserved and unmapped.
    virtual Status map(Address address, std::uint64_t bytes, PhysicalId id) noexcept = 0;
    // Read and write access to a range that is tiled by whole mappings.
    virtual Status set_access(Address address, std::uint64_t bytes) noexcept = 0;
    // The same without waiting where fresh memory is still being cleared: `*clearing` is then the fence behind that,
    // and the range may be used once it has passed (unmap() answers timeout before). Null: it may be used now.
    virtual Status open_access(Address address, std::uint64_t bytes, std::unique_ptr<Fence> *clearing) noexcept {
        clearing->reset();
        return set_access(address, bytes);
    }
    // Takes a range that one map() call made away again; afterwards an access faults. Does not free the memory.
    virtual Status unmap(Address address, std::uint64_t bytes) noexcept = 0;

    virtual Result<MemoryInfo> memory_info() noexcept = 0;
    virtual DriverStats stats() const noexcept { return {}; }

    // Called once by each thread before its first other call (binds the CUDA context; nothing on the host).
    virtual Status bind_thread() noexcept { return {}; }
    // A fence behind all work enqueued on `stream` so far (a CUstream as an integer, 0 = the legacy default stream).
    virtual Result<std::unique_ptr<Fence>> record(std::uint64_t stream) noexcept = 0;
    // True where a DLPack tensor of this memory is a CPU tensor; ordinal() is DLPack's device_id.
    virtual bool on_cpu() const noexcept = 0;
    virtual int ordinal() const noexcept { return 0; }
};

}  // namespace elastickv
