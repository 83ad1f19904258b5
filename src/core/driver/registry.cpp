#include "driver/registry.hpp"

#include <algorithm>
#include <cctype>
#include <string_view>

#include "driver/cuda.hpp"
#include "driver/host.hpp"
#include "driver/text.hpp"

namespace elastickv {

namespace {

constexpr const char *kKnown = "'host', 'cuda:<ordinal>', 'GPU-<uuid>' and 'MIG-<uuid>'";

bool all_digits(std::string_view text) {
    return !text.empty() && text.size() <= 4 &&
           std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c) != 0; });
}

Result<std::shared_ptr<Driver>> open_host(const DriverOptions &options) {
    HostOptions host;
    if (options.page_bytes != 0) host.page_bytes = options.page_bytes;
    host.total_bytes = options.total_bytes;
    if (!options.library.empty()) {
        return Status(Code::invalid, "the device 'host' takes no library, but '" + options.library + "' was given");
    }
    return make_host_driver(host);
}

Result<std::shared_ptr<Driver>> open_cuda(std::string device, const DriverOptions &options) {
    if (options.total_bytes != 0) {
        return Status(
            Code::invalid,
            "total_bytes of " + human_bytes(options.total_bytes) +
                " was given for a GPU, whose memory is what it is; leave it 0 and set a budget on the ledger");
    }
    CudaOptions cuda;
    cuda.device = std::move(device);
    if (!options.library.empty()) cuda.library = options.library;
    cuda.page_bytes = options.page_bytes;
    cuda.allow_context = options.allow_context;
    return make_cuda_driver(cuda);
}

}  // namespace

Result<std::shared_ptr<Driver>> open_driver(const std::string &device, const DriverOptions &options) {
    constexpr std::string_view kCuda = "cuda:";
    if (device == "host") return open_host(options);
    if (device == "cuda") return open_cuda("0", options);
    if (device.starts_with(kCuda) && all_digits(std::string_view(device).substr(kCuda.size()))) {
        return open_cuda(device.substr(kCuda.size()), options);
    }
    if (device.starts_with("GPU-") || device.starts_with("MIG-")) return open_cuda(device, options);
    return Status(Code::invalid, "there is no device '" + device + "'; known are " + kKnown);
}

}  // namespace elastickv
