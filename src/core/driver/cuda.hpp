// The CUDA driver: GPU memory through the virtual memory calls of libcuda.so.1, which is loaded at run time.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.hpp"
#include "driver/driver.hpp"

namespace elastickv {

struct CudaOptions {
    std::string device = "0";                // "GPU-<uuid>", "MIG-<uuid>", or an ordinal of this process
    std::string library = "libcuda.so.1";    // name or path
    std::uint64_t page_bytes = 0;            // 0: the device's minimum granularity; else that times a power of two
    bool allow_context = false;              // make the primary context if this process has none yet
    std::uint64_t clear_timeout_ms = 10000;  // how long set_access() waits for fresh memory to be cleared
};

// Opens the device; makes no context (see bind_thread). not_found: no library, symbol or device. invalid: page_bytes.
//
// Calls work from any thread: where the primary context is not current they make it so for the call. bind_thread()
// makes it current for good, which is cheaper. If set_access() times out, unmap() of that range answers timeout until
// the clearing is done, for taking memory away from under it would be an error that ends the context.
Result<std::shared_ptr<Driver>> make_cuda_driver(const CudaOptions &options);

}  // namespace elastickv
