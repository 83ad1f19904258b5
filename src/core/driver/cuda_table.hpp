// The CUDA driver library as a table of functions, filled at run time.
//
// Own minimal declarations of the driver's C interface: the numbers and layouts are those of its documentation
// (CUDA Driver API reference, sections "Data types" and "Virtual Memory Management"), so that neither the toolkit nor
// its headers are needed to build. Only cuda_table.cpp knows the library's symbol names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/status.hpp"

namespace elastickv::cuda {

using Code = int;  // CUresult
inline constexpr Code kSuccess = 0;
inline constexpr Code kOutOfMemory = 2;
inline constexpr Code kDeinitialized = 4;
inline constexpr Code kInvalidHandle = 400;
inline constexpr Code kNotReady = 600;

using Device = int;
using Context = void *;
using Stream = void *;
using Event = void *;
using DevicePointer = unsigned long long;
using Handle = unsigned long long;

struct Uuid {
    unsigned char bytes[16];
};

struct Location {
    int type;  // kLocationDevice
    int id;    // the device's ordinal
};
inline constexpr int kLocationDevice = 1;

struct AllocationProperties {
    int type;          // kAllocationPinned
    int handle_types;  // 0: not exported
    Location location;
    void *win32_metadata;
    struct {
        unsigned char compression;
        unsigned char gpu_direct_rdma;
        unsigned short usage;
        unsigned char reserved[4];
    } flags;
};
inline constexpr int kAllocationPinned = 1;
static_assert(sizeof(AllocationProperties) == 32);

struct AccessDescription {
    Location location;
    int flags;  // kAccessReadWrite
};
inline constexpr int kAccessReadWrite = 3;
static_assert(sizeof(AccessDescription) == 12);

inline constexpr int kGranularityMinimum = 0;
inline constexpr int kAttributeVirtualMemory = 102;  // CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventDisableTiming = 2;

// One function of the library, with the name it has there (for the texts of failures).
template <class... Arguments> struct Function {
    const char *name = nullptr;
    Code (*pointer)(Arguments...) = nullptr;
    Code operator()(Arguments... arguments) const noexcept { return pointer(arguments...); }
    // For calls in destructors, which nobody can repeat: tried once more where the library refuses.
    Code insist(Arguments... arguments) const noexcept {
        const Code code = pointer(arguments...);
        return code == kSuccess ? code : pointer(arguments...);
    }
};

struct Table {
    Function<unsigned> init;
    Function<int *> driver_version;
    Function<Code, const char **> error_name;
    Function<Code, const char **> error_string;

    Function<int *> device_count;
    Function<Device *, int> device_get;
    Function<Uuid *, Device> device_uuid;           // of the whole GPU
    Function<Uuid *, Device> device_instance_uuid;  // of the MIG instance, where the device is one
    Function<int *, int, Device> device_attribute;

    Function<Device, unsigned *, int *> context_state;  // of the device's primary context
    Function<Context *, Device> context_retain;
    Function<Device> context_release;
    Function<Context> context_set;
    Function<Context *> context_get;

    Function<std::size_t *, const AllocationProperties *, int> granularity;
    Function<DevicePointer *, std::size_t, std::size_t, DevicePointer, unsigned long long> address_reserve;
    Function<DevicePointer, std::size_t> address_free;
    Function<Handle *, std::size_t, const AllocationProperties *, unsigned long long> memory_create;
    Function<Handle> memory_release;
    Function<DevicePointer, std::size_t, std::size_t, Handle, unsigned long long> memory_map;
    Function<DevicePointer, std::size_t, const AccessDescription *, std::size_t> set_access;
    Function<DevicePointer, std::size_t> memory_unmap;
    Function<std::size_t *, std::size_t *> memory_info;
    Function<DevicePointer, unsigned char, std::size_t, Stream> fill_async;

    Function<Stream *, unsigned> stream_create;
    Function<Stream> stream_destroy;
    Function<Event *, unsigned> event_create;
    Function<Event, Stream> event_record;
    Function<Event> event_query;
    Function<Event> event_destroy;

    // "CUDA_ERROR_INVALID_VALUE (invalid argument)"
    std::string describe(Code code) const;
    // A status for a failed call: what was tried, the library's function, its error. out_of_memory for kOutOfMemory.
    Status failure(const char *function, Code code, const std::string &tried) const;
};

// Loads the library (it is never unloaded) and fills the table. not_found: no library, or a symbol is missing.
Result<Table> load_table(const std::string &library);

// "13.0"; "unknown" if the library does not say.
std::string driver_version_text(const Table &table);

}  // namespace elastickv::cuda
