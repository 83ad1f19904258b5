#include "driver/cuda_table.hpp"

#include <dlfcn.h>

namespace elastickv::cuda {

namespace {

// Collects the first symbol that is missing; later ones are not looked for.
class Filler {
  public:
    explicit Filler(void *library) : library_(library) {}

    template <class... Arguments> void operator()(Function<Arguments...> &function, const char *name) {
        function.name = name;
        function.pointer = reinterpret_cast<Code (*)(Arguments...)>(::dlsym(library_, name));
        if (function.pointer == nullptr && missing_ == nullptr) missing_ = name;
    }
    const char *missing() const { return missing_; }

  private:
    void *library_;
    const char *missing_ = nullptr;
};

void fill_general(Filler &fill, Table &table) {
    fill(table.driver_version, "cuDriverGetVersion");
    fill(table.init, "cuInit");
    fill(table.error_name, "cuGetErrorName");
    fill(table.error_string, "cuGetErrorString");
    fill(table.device_count, "cuDeviceGetCount");
    fill(table.device_get, "cuDeviceGet");
    fill(table.device_uuid, "cuDeviceGetUuid");
    fill(table.device_instance_uuid, "cuDeviceGetUuid_v2");
    fill(table.device_attribute, "cuDeviceGetAttribute");
    fill(table.context_state, "cuDevicePrimaryCtxGetState");
    fill(table.context_retain, "cuDevicePrimaryCtxRetain");
    fill(table.context_release, "cuDevicePrimaryCtxRelease_v2");
    fill(table.context_set, "cuCtxSetCurrent");
    fill(table.context_get, "cuCtxGetCurrent");
}

void fill_memory(Filler &fill, Table &table) {
    fill(table.granularity, "cuMemGetAllocationGranularity");
    fill(table.address_reserve, "cuMemAddressReserve");
    fill(table.address_free, "cuMemAddressFree");
    fill(table.memory_create, "cuMemCreate");
    fill(table.memory_release, "cuMemRelease");
    fill(table.memory_map, "cuMemMap");
    fill(table.set_access, "cuMemSetAccess");
    fill(table.memory_unmap, "cuMemUnmap");
    fill(table.memory_info, "cuMemGetInfo_v2");
    fill(table.fill_async, "cuMemsetD8Async");
    fill(table.stream_create, "cuStreamCreate");
    fill(table.stream_destroy, "cuStreamDestroy_v2");
    fill(table.event_create, "cuEventCreate");
    fill(table.event_record, "cuEventRecord");
    fill(table.event_query, "cuEventQuery");
    fill(table.event_destroy, "cuEventDestroy_v2");
}

}  // namespace

std::string Table::describe(Code code) const {
    const char *name = nullptr;
    const char *text = nullptr;
    if (error_name(code, &name) != kSuccess || name == nullptr) return "CUDA error " + std::to_string(code);
    if (error_string(code, &text) != kSuccess || text == nullptr) return name;
    return std::string(name) + " (" + text + ")";
}

Status Table::failure(const char *function, Code code, const std::string &tried) const {
    const bool out = code == kOutOfMemory;
    return {out ? elastickv::Code::out_of_memory : elastickv::Code::driver,
            tried + " failed: " + function + " returned " + describe(code)};
}

Result<Table> load_table(const std::string &library) {
    // NODELETE: threads of the library may outlive every driver object.
    void *handle = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle == nullptr) {
        const char *reason = ::dlerror();
        return Status(
            elastickv::Code::not_found,
            "the CUDA driver library '" + library + "' cannot be loaded (" +
                (reason == nullptr ? "no reason given" : reason) +
                "); install the NVIDIA driver, start the container with GPU access, or use the device 'host'");
    }
    Table table;
    Filler fill(handle);
    fill_general(fill, table);
    fill_memory(fill, table);
    if (fill.missing() != nullptr) {
        return Status(elastickv::Code::not_found, "the CUDA driver library '" + library + "', version " +
                                                      driver_version_text(table) + ", has no function " +
                                                      fill.missing() +
                                                      "; an NVIDIA driver for CUDA 11.4 or newer is needed");
    }
    return table;
}

std::string driver_version_text(const Table &table) {
    int version = 0;
    if (table.driver_version.pointer == nullptr || table.driver_version(&version) != kSuccess) return "unknown";
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace elastickv::cuda
