// The stand-in's devices, contexts, streams and events: the same entry points as libcuda.so.1.
#include <unistd.h>

#include <cstring>
#include <iterator>

#include "state.hpp"

namespace standin {

namespace {

struct Name {
    int code;
    const char *name;
    const char *text;
};
constexpr Name kNames[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {cuda::kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {kAlreadyMapped, "CUDA_ERROR_ALREADY_MAPPED", "resource already mapped"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {cuda::kNotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
};

const Name *find_name(int code) {
    for (const Name &name : kNames) {
        if (name.code == code) return &name;
    }
    return nullptr;
}

bool known(const State &all, int device) { return device >= 0 && device < static_cast<int>(all.devices.size()); }

cuda::Uuid uuid_of(int device) {
    cuda::Uuid uuid{};
    for (int i = 0; i < 16; ++i) uuid.bytes[i] = static_cast<unsigned char>(0x10 + i);
    uuid.bytes[15] = static_cast<unsigned char>(device);
    return uuid;
}

}  // namespace

STANDIN_EXPORT int cuInit(unsigned flags) {
    State &all = state();
    {
        std::lock_guard guard(all.mutex);
        if (all.pid == -1) reset(all, 0, 0, 0, 0);
        if (all.pid == ::getpid() && flags == 0) all.initialized = true;
    }
    return Entry("cuInit").code();
}

STANDIN_EXPORT int cuDriverGetVersion(int *version) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    *version = all.version == 0 ? 13000 : all.version;
    return 0;
}

STANDIN_EXPORT int cuGetErrorName(int code, const char **name) {
    const Name *found = find_name(code);
    if (found == nullptr) return kInvalidValue;
    *name = found->name;
    return 0;
}

STANDIN_EXPORT int cuGetErrorString(int code, const char **text) {
    const Name *found = find_name(code);
    if (found == nullptr) return kInvalidValue;
    *text = found->text;
    return 0;
}

STANDIN_EXPORT int cuDeviceGetCount(int *count) {
    Entry entry("cuDeviceGetCount");
    if (entry.code() == 0) *count = static_cast<int>(entry.all().devices.size());
    return entry.code();
}

STANDIN_EXPORT int cuDeviceGet(int *device, int ordinal) {
    Entry entry("cuDeviceGet");
    if (entry.code() != 0) return entry.code();
    if (!known(entry.all(), ordinal)) return kInvalidDevice;
    *device = ordinal;
    return 0;
}

STANDIN_EXPORT int cuDeviceGetUuid(cuda::Uuid *uuid, int device) {
    Entry entry("cuDeviceGetUuid");
    if (entry.code() != 0) return entry.code();
    if (!known(entry.all(), device)) return kInvalidDevice;
    *uuid = uuid_of(device);
    return 0;
}

STANDIN_EXPORT int cuDeviceGetUuid_v2(cuda::Uuid *uuid, int device) {
    Entry entry("cuDeviceGetUuid_v2");
    if (entry.code() != 0) return entry.code();
    if (!known(entry.all(), device)) return kInvalidDevice;
    *uuid = uuid_of(device);
    if (device >= 2) uuid->bytes[0] = 0xee;  // a MIG instance has a name of its own
    return 0;
}

STANDIN_EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
    Entry entry("cuDeviceGetAttribute");
    if (entry.code() != 0) return entry.code();
    if (!known(entry.all(), device)) return kInvalidDevice;
    *value = attribute == cuda::kAttributeVirtualMemory ? 1 : 0;
    return 0;
}

STANDIN_EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    Entry entry("cuDevicePrimaryCtxGetState");
    if (entry.code() != 0) return entry.code();
    if (!known(entry.all(), device)) return kInvalidDevice;
    const Device &found = entry.all().devices[static_cast<std::size_t>(device)];
    *flags = 0;
    *active = found.engine || found.references > 0 ? 1 : 0;
    return 0;
}

STANDIN_EXPORT int cuDevicePrimaryCtxRetain(void **context, int device) {
    Entry entry("cuDevicePrimaryCtxRetain");
    if (entry.code() != 0) return entry.code();
    if (!known(entry.all(), device)) return kInvalidDevice;
    Device &found = entry.all().devices[static_cast<std::size_t>(device)];
    ++found.references;
    *context = &found.context;
    return 0;
}

STANDIN_EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    Entry entry("cuDevicePrimaryCtxRelease_v2");
    if (entry.code() != 0) return entry.code();
    if (!known(entry.all(), device)) return kInvalidDevice;
    Device &found = entry.all().devices[static_cast<std::size_t>(device)];
    if (found.references == 0) return kInvalidContext;
    --found.references;
    return 0;
}

STANDIN_EXPORT int cuCtxSetCurrent(void *context) {
    Entry entry("cuCtxSetCurrent");
    if (entry.code() == 0) current_context() = static_cast<Context *>(context);
    return entry.code();
}

STANDIN_EXPORT int cuCtxGetCurrent(void **context) {
    Entry entry("cuCtxGetCurrent");
    if (entry.code() == 0) *context = current_context();
    return entry.code();
}

STANDIN_EXPORT int cuStreamCreate(void **stream, unsigned flags) {
    Entry entry("cuStreamCreate", true);
    if (entry.code() != 0) return entry.code();
    if (flags > cuda::kStreamNonBlocking) return kInvalidValue;
    auto made = std::make_unique<Stream>();
    made->held = entry.all().hold_new;
    *stream = made.get();
    entry.all().streams.emplace(made.get(), std::move(made));
    return 0;
}

STANDIN_EXPORT int cuStreamDestroy_v2(void *stream) {
    Entry entry("cuStreamDestroy_v2");
    if (entry.code() != 0) return entry.code();
    auto found = entry.all().streams.find(stream);
    if (found == entry.all().streams.end()) return kInvalidHandle;
    let_go(entry.all(), *found->second);  // what is enqueued still runs
    entry.all().streams.erase(found);
    return 0;
}

STANDIN_EXPORT int cuMemsetD8Async(cuda::DevicePointer address, unsigned char value, std::size_t bytes, void *stream) {
    Entry entry("cuMemsetD8Async", true);
    if (entry.code() != 0) return entry.code();
    Stream *found = stream_of(entry.all(), stream);
    if (found == nullptr) return kInvalidHandle;
    if (!accessible(entry.all(), address, bytes)) return kInvalidValue;
    enqueue(entry.all(), *found, {Item::Kind::fill, address, bytes, value, nullptr, 0});
    return 0;
}

STANDIN_EXPORT int cuEventCreate(void **event, unsigned flags) {
    Entry entry("cuEventCreate", true);
    if (entry.code() != 0) return entry.code();
    if (flags != cuda::kEventDisableTiming) return kInvalidValue;
    auto made = std::make_unique<Event>();
    *event = made.get();
    entry.all().events.emplace(made.get(), std::move(made));
    return 0;
}

STANDIN_EXPORT int cuEventRecord(void *event, void *stream) {
    Entry entry("cuEventRecord", true);
    if (entry.code() != 0) return entry.code();
    auto found = entry.all().events.find(event);
    Stream *on = stream_of(entry.all(), stream);
    if (found == entry.all().events.end() || on == nullptr) return kInvalidHandle;
    const std::uint64_t generation = ++found->second->recorded;
    enqueue(entry.all(), *on, {Item::Kind::event, 0, 0, 0, event, generation});
    return 0;
}

STANDIN_EXPORT int cuEventQuery(void *event) {
    Entry entry("cuEventQuery");
    if (entry.code() != 0) return entry.code();
    auto found = entry.all().events.find(event);
    if (found == entry.all().events.end()) return kInvalidHandle;
    return found->second->completed == found->second->recorded ? 0 : cuda::kNotReady;
}

STANDIN_EXPORT int cuEventDestroy_v2(void *event) {
    Entry entry("cuEventDestroy_v2");
    if (entry.code() != 0) return entry.code();
    return entry.all().events.erase(event) == 1 ? 0 : kInvalidHandle;
}

}  // namespace standin
