// From texts to drivers, and the texts people read when that fails.
#include "driver/registry.hpp"

#include "check.hpp"
#include "driver/text.hpp"

namespace elastickv {

namespace {

std::string message(const std::string &device, const DriverOptions &options, Code code) {
    const Result<std::shared_ptr<Driver>> opened = open_driver(device, options);
    if (opened.ok()) check::fail(__FILE__, __LINE__, "opened '" + device + "'");
    CHECK_EQ(std::string(code_name(opened.status().code())), std::string(code_name(code)));
    return opened.status().message();
}

TEST("driver registry: host") {
    const DriverOptions options{128 * 1024, std::uint64_t{8} << 20, "", false};
    Result<std::shared_ptr<Driver>> driver = open_driver("host", options);
    CHECK_OK(driver);
    CHECK_EQ((*driver)->name(), std::string("host"));
    CHECK_EQ((*driver)->device_id(), std::string("host"));
    CHECK_EQ((*driver)->granularity(), 128u * 1024);
    CHECK((*driver)->on_cpu());
    Result<std::shared_ptr<Driver>> by_default = open_driver("host");
    CHECK_OK(by_default);
    CHECK_EQ((*by_default)->granularity(), 64u * 1024);
}

TEST("driver registry: an unknown device lists what is known") {
    for (const char *device : {"hots", "", "cuda:", "cuda:x", "cuda:-1", "cuda:99999", "gpu0", "Host"}) {
        CHECK_EQ(message(device, {}, Code::invalid),
                 "there is no device '" + std::string(device) +
                     "'; known are 'host', 'cuda:<ordinal>', 'GPU-<uuid>' and 'MIG-<uuid>'");
    }
}

TEST("driver registry: options that do not fit the kind are refused") {
    CHECK(message("host", {0, 0, "libcuda.so.1", false}, Code::invalid).find("takes no library") != std::string::npos);
    CHECK(message("cuda:0", {0, 1 << 30, "", false}, Code::invalid).find("total_bytes of 1 GiB") != std::string::npos);
    CHECK(message("host", {100, 0, "", false}, Code::invalid).find("page_bytes of 100") != std::string::npos);
}

TEST("driver registry: a missing CUDA library names itself and the remedy") {
    for (const char *device : {"cuda", "cuda:0", "GPU-00000000-0000-0000-0000-000000000000"}) {
        const std::string text = message(device, {0, 0, "libno-such-cuda.so.1", false}, Code::not_found);
        CHECK(text.find("the CUDA driver library 'libno-such-cuda.so.1' cannot be loaded (") == 0);
        CHECK(text.find("install the NVIDIA driver") != std::string::npos);
    }
}

TEST("driver registry: a library that is not the CUDA driver names what it lacks") {
    const std::string text = message("cuda:0", {0, 0, "libc.so.6", false}, Code::not_found);
    CHECK_EQ(text,
             std::string("the CUDA driver library 'libc.so.6', version unknown, has no function cuDriverGetVersion; "
                         "an NVIDIA driver for CUDA 11.4 or newer is needed"));
}

TEST("driver texts: sizes, addresses, errors") {
    CHECK_EQ(human_bytes(0), std::string("0 bytes"));
    CHECK_EQ(human_bytes(1023), std::string("1023 bytes"));
    CHECK_EQ(human_bytes(65536), std::string("64 KiB"));
    CHECK_EQ(human_bytes(std::uint64_t{3} << 30), std::string("3 GiB"));
    CHECK_EQ(human_bytes((std::uint64_t{3} << 30) / 2), std::string("1.50 GiB (1610612736 bytes)"));
    CHECK_EQ(human_bytes(~std::uint64_t{0}).substr(0, 8), std::string("16384.00"));
    CHECK_EQ(hex(0x7f00), std::string("0x7f00"));
    CHECK_EQ(errno_text(12), std::string("ENOMEM (Cannot allocate memory)"));
    CHECK_EQ(errno_text(99999), std::string("errno 99999"));
}

}  // namespace

}  // namespace elastickv
