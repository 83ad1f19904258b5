// The stand-in's memory calls: the same entry points as libcuda.so.1, over memory files and mmap.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <iterator>

#include "state.hpp"

namespace standin {

namespace {

constexpr unsigned char kGarbage = 0xA5;  // what fresh memory holds: nobody may rely on zeros

void *pointer(std::uint64_t address) { return reinterpret_cast<void *>(static_cast<std::uintptr_t>(address)); }

bool multiple(const State &all, std::uint64_t bytes) { return bytes != 0 && bytes % all.granularity == 0; }

bool valid(const State &all, const cuda::AllocationProperties *properties) {
    return properties != nullptr && properties->type == cuda::kAllocationPinned && properties->handle_types == 0 &&
           properties->location.type == cuda::kLocationDevice && properties->location.id >= 0 &&
           properties->location.id < static_cast<int>(all.devices.size());
}

bool reserved(const State &all, std::uint64_t address, std::uint64_t bytes) {
    auto after = all.reservations.upper_bound(address);
    if (after == all.reservations.begin()) return false;
    const auto &[start, length] = *std::prev(after);
    return address + bytes <= start + length;
}

bool anything_mapped(const State &all, std::uint64_t address, std::uint64_t bytes) {
    auto next = all.mappings.lower_bound(address);
    if (next != all.mappings.end() && next->first < address + bytes) return true;
    return next != all.mappings.begin() && std::prev(next)->first + std::prev(next)->second.bytes > address;
}

bool place(std::uint64_t address, std::uint64_t bytes, int protection, int fd) {
    const int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED : MAP_SHARED | MAP_FIXED;
    void *at = ::mmap(pointer(address), bytes, protection, flags, fd, 0);
    return at != MAP_FAILED && ::madvise(at, bytes, MADV_DONTFORK) == 0;
}

// A memory file of so many bytes, all of them garbage; -1 when there is no memory.
int garbage_file(std::uint64_t bytes) {
    const int fd = ::memfd_create("standin-cuda", MFD_CLOEXEC);
    if (fd < 0) return -1;
    void *at = MAP_FAILED;
    if (::ftruncate(fd, static_cast<off_t>(bytes)) == 0) at = ::mmap(nullptr, bytes, PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
        ::close(fd);
        return -1;
    }
    std::memset(at, kGarbage, bytes);
    ::munmap(at, bytes);
    return fd;
}

}  // namespace

STANDIN_EXPORT int cuMemGetAllocationGranularity(std::size_t *granularity, const cuda::AllocationProperties *properties,
                                                 int option) {
    Entry entry("cuMemGetAllocationGranularity");
    if (entry.code() != 0) return entry.code();
    if (granularity == nullptr || !valid(entry.all(), properties) || option != 0) return kInvalidValue;
    *granularity = entry.all().granularity;
    return 0;
}

STANDIN_EXPORT int cuMemAddressReserve(cuda::DevicePointer *out, std::size_t bytes, std::size_t alignment,
                                       cuda::DevicePointer hint, unsigned long long flags) {
    Entry entry("cuMemAddressReserve");
    if (entry.code() != 0) return entry.code();
    State &all = entry.all();
    if (out == nullptr || !multiple(all, bytes) || hint != 0 || flags != 0 || (alignment & (alignment - 1)) != 0) {
        return kInvalidValue;
    }
    const std::uint64_t step = alignment > all.granularity ? alignment : all.granularity;
    const int protection = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *raw = ::mmap(nullptr, bytes + step, PROT_NONE, protection, -1, 0);
    if (raw == MAP_FAILED) return cuda::kOutOfMemory;
    const std::uint64_t start = reinterpret_cast<std::uintptr_t>(raw);
    const std::uint64_t address = (start + step - 1) / step * step;
    if (address > start) ::munmap(raw, address - start);
    ::munmap(pointer(address + bytes), start + step - address);
    ::madvise(pointer(address), bytes, MADV_DONTFORK);
    all.reservations.emplace(address, bytes);
    *out = address;
    return 0;
}

STANDIN_EXPORT int cuMemAddressFree(cuda::DevicePointer address, std::size_t bytes) {
    Entry entry("cuMemAddressFree");
    if (entry.code() != 0) return entry.code();
    State &all = entry.all();
    auto found = all.reservations.find(address);
    if (found == all.reservations.end() || found->second != bytes || anything_mapped(all, address, bytes))
        return kInvalidValue;
    all.reservations.erase(found);
    ::munmap(pointer(address), bytes);
    return 0;
}

STANDIN_EXPORT int cuMemCreate(cuda::Handle *out, std::size_t bytes, const cuda::AllocationProperties *properties,
                               unsigned long long flags) {
    Entry entry("cuMemCreate");
    if (entry.code() != 0) return entry.code();
    State &all = entry.all();
    if (out == nullptr || !multiple(all, bytes) || !valid(all, properties) || flags != 0) return kInvalidValue;
    Device &device = all.devices[static_cast<std::size_t>(properties->location.id)];
    if (bytes > all.total - device.used) return cuda::kOutOfMemory;
    const int fd = garbage_file(bytes);
    if (fd < 0) return cuda::kOutOfMemory;
    device.used += bytes;
    *out = all.next_handle++;
    all.memory.emplace(*out, Memory{fd, bytes, properties->location.id, 0, false});
    return 0;
}

STANDIN_EXPORT int cuMemRelease(cuda::Handle handle) {
    Entry entry("cuMemRelease");
    if (entry.code() != 0) return entry.code();
    auto found = entry.all().memory.find(handle);
    if (found == entry.all().memory.end() || found->second.released) return kInvalidValue;
    found->second.released = true;
    if (found->second.mappings == 0) drop_memory(entry.all(), found);
    return 0;
}

STANDIN_EXPORT int cuMemMap(cuda::DevicePointer address, std::size_t bytes, std::size_t offset, cuda::Handle handle,
                            unsigned long long flags) {
    Entry entry("cuMemMap");
    if (entry.code() != 0) return entry.code();
    State &all = entry.all();
    auto memory = all.memory.find(handle);
    if (memory == all.memory.end() || memory->second.released || memory->second.bytes != bytes || offset != 0 ||
        flags != 0 || address % all.granularity != 0 || !reserved(all, address, bytes)) {
        return kInvalidValue;
    }
    if (anything_mapped(all, address, bytes)) return kAlreadyMapped;
    if (!place(address, bytes, PROT_NONE, memory->second.fd)) return cuda::kOutOfMemory;
    all.mappings.emplace(address, Mapping{bytes, handle, false});
    ++memory->second.mappings;
    return 0;
}

STANDIN_EXPORT int cuMemSetAccess(cuda::DevicePointer address, std::size_t bytes, const cuda::AccessDescription *access,
                                  std::size_t count) {
    Entry entry("cuMemSetAccess");
    if (entry.code() != 0) return entry.code();
    State &all = entry.all();
    if (access == nullptr || count != 1 || access->flags != cuda::kAccessReadWrite ||
        access->location.type != cuda::kLocationDevice || all.mappings.find(address) == all.mappings.end()) {
        return kInvalidValue;
    }
    std::uint64_t reached = address;
    auto it = all.mappings.find(address);
    for (; it != all.mappings.end() && it->first == reached && reached < address + bytes; ++it)
        reached += it->second.bytes;
    if (reached != address + bytes) return kInvalidValue;
    if (::mprotect(pointer(address), bytes, PROT_READ | PROT_WRITE) != 0) return cuda::kOutOfMemory;
    for (auto set = all.mappings.find(address); set != it; ++set) set->second.access = true;
    return 0;
}

STANDIN_EXPORT int cuMemUnmap(cuda::DevicePointer address, std::size_t bytes) {
    Entry entry("cuMemUnmap");
    if (entry.code() != 0) return entry.code();
    State &all = entry.all();
    auto found = all.mappings.find(address);
    if (found == all.mappings.end() || found->second.bytes != bytes) return kInvalidValue;
    check_quiet(all, address, bytes);
    if (!place(address, bytes, PROT_NONE, -1)) return cuda::kOutOfMemory;
    auto memory = all.memory.find(found->second.handle);
    all.mappings.erase(found);
    if (--memory->second.mappings == 0 && memory->second.released) drop_memory(all, memory);
    return 0;
}

STANDIN_EXPORT int cuMemGetInfo_v2(std::size_t *free, std::size_t *total) {
    Entry entry("cuMemGetInfo_v2", true);
    if (entry.code() != 0) return entry.code();
    const Device &device = entry.all().devices[static_cast<std::size_t>(current_context()->device)];
    *free = entry.all().total - device.used;
    *total = entry.all().total;
    return 0;
}

}  // namespace standin
