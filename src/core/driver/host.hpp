// The host driver: real pages of one memfd behind real addresses. An address with no page behind it faults.
//
// The kernel's own accounting shows what is mapped: /proc/PID/smaps lists it under "/memfd:elastickv", and fstat of the
// file (st_blocks) what has been created. A forked child inherits neither the mappings nor the file.
#pragma once

#include <cstdint>
#include <memory>

#include "base/status.hpp"
#include "driver/driver.hpp"

namespace elastickv {

struct HostOptions {
    std::uint64_t page_bytes = 64 * 1024;  // a multiple of 4096
    std::uint64_t total_bytes = 0;         // what this driver may create; 0: the machine's memory
};

// invalid: page_bytes or total_bytes. driver: the kernel gave no memfd.
Result<std::shared_ptr<Driver>> make_host_driver(const HostOptions &options);

}  // namespace elastickv
