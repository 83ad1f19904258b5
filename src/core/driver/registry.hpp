// From a device's text to its driver: "host", "cuda:0", "0", "GPU-<uuid>", "MIG-<uuid>".
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.hpp"
#include "driver/driver.hpp"

namespace elastickv {

struct DriverOptions {
    std::uint64_t page_bytes =
        0;  // host: the page; 0: the default. cuda: the device's own, or that times a power of two
    std::uint64_t total_bytes = 0;  // host: what may be created; 0: the machine's memory. cuda: must be 0
    std::string library;            // cuda: path or name of the driver library; empty: "libcuda.so.1"
    bool allow_context = false;     // cuda: create the device's primary context if this process has none yet
};

// invalid: the text names no kind of device (the message lists what is known), or an option does not fit the kind.
// not_found: no such device, or no driver library.
Result<std::shared_ptr<Driver>> open_driver(const std::string &device, const DriverOptions &options = {});

}  // namespace elastickv
