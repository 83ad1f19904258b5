#include "driver/cuda_device.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cstdio>
#include <cstring>

namespace elastickv::cuda {

namespace {

using StatusCode = elastickv::Code;

std::string lower(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    return text;
}

// The device's own name: of the MIG instance where it is one.
Status read_id(const Table &table, Device device, std::string *id) {
    Uuid gpu{};
    Uuid instance{};
    if (Code code = table.device_uuid(&gpu, device); code != kSuccess) {
        return table.failure(table.device_uuid.name, code, "reading the UUID of CUDA device " + std::to_string(device));
    }
    if (Code code = table.device_instance_uuid(&instance, device); code != kSuccess) {
        return table.failure(table.device_instance_uuid.name, code,
                             "reading the UUID of CUDA device " + std::to_string(device));
    }
    const bool is_instance = std::memcmp(gpu.bytes, instance.bytes, sizeof gpu.bytes) != 0;
    *id = uuid_text(instance, is_instance);
    return {};
}

}  // namespace

std::string uuid_text(const Uuid &uuid, bool instance) {
    std::string text = instance ? "MIG-" : "GPU-";
    for (std::size_t i = 0; i < sizeof uuid.bytes; ++i) {
        if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
        std::array<char, 3> hex{};
        std::snprintf(hex.data(), hex.size(), "%02x", uuid.bytes[i]);
        text += hex.data();
    }
    return text;
}

Status Gpu::find(const std::string &device) {
    int count = 0;
    if (Code code = table_.device_count(&count); code != kSuccess) {
        return table_.failure(table_.device_count.name, code, "counting the CUDA devices");
    }
    int wanted = -1;
    const auto [end, error] = std::from_chars(device.data(), device.data() + device.size(), wanted);
    const bool by_ordinal = error == std::errc() && end == device.data() + device.size();
    std::string known;
    for (int ordinal = 0; ordinal < count; ++ordinal) {
        Device found = 0;
        if (Code code = table_.device_get(&found, ordinal); code != kSuccess) {
            return table_.failure(table_.device_get.name, code, "opening CUDA device " + std::to_string(ordinal));
        }
        std::string id;
        if (Status status = read_id(table_, found, &id); !status.ok()) return status;
        if (by_ordinal ? ordinal == wanted : lower(id) == lower(device)) {
            device_ = found;
            ordinal_ = ordinal;
            id_ = id;
            return {};
        }
        known += (known.empty() ? "" : ", ") + std::to_string(ordinal) + " = " + id;
    }
    return {StatusCode::not_found, "there is no CUDA device '" + device + "' in this process; " +
                                       (known.empty() ? "it sees none" : "it sees " + known) +
                                       " (CUDA_VISIBLE_DEVICES chooses what it sees)"};
}

Result<std::shared_ptr<Gpu>> Gpu::open(const std::string &device, const std::string &library, bool allow_context) {
    Result<Table> table = load_table(library);
    if (!table.ok()) return table.status();
    if (Code code = table->init(0); code != kSuccess) {
        Status status = table->failure(table->init.name, code, "starting the CUDA driver library '" + library + "'");
        return Status(StatusCode::not_found, status.message() + "; check the GPU with nvidia-smi");
    }
    std::shared_ptr<Gpu> gpu(new Gpu(*table, allow_context));
    if (Status status = gpu->find(device); !status.ok()) return status;
    int supported = 0;
    const Code code = gpu->table_.device_attribute(&supported, kAttributeVirtualMemory, gpu->device_);
    if (code != kSuccess || supported == 0) {
        return Status(StatusCode::driver, "the device " + gpu->id_ + " has no virtual memory management (CUDA driver " +
                                              driver_version_text(gpu->table_) + "); elastickv cannot manage it");
    }
    return gpu;
}

Gpu::~Gpu() {
    // A failing release is of no consequence: the process keeps the context it had.
    if (context_.load() != nullptr && !abandoned_) static_cast<void>(table_.context_release.insist(device_));
}

Result<Context> Gpu::context() {
    if (Context known = context_.load(); known != nullptr) return known;
    std::lock_guard guard(mutex_);
    if (Context known = context_.load(); known != nullptr) return known;
    unsigned flags = 0;
    int active = 0;
    if (Code code = table_.context_state(device_, &flags, &active); code != kSuccess) {
        return table_.failure(table_.context_state.name, code, "asking for the primary context of " + id_);
    }
    if (active == 0 && !allow_context_) {
        return Status(StatusCode::driver,
                      "this process has no CUDA context on " + id_ +
                          " yet; let the engine start CUDA first (torch.cuda.init()), or open the driver "
                          "with allow_context to have one made");
    }
    Context context = nullptr;
    if (Code code = table_.context_retain(&context, device_); code != kSuccess) {
        return table_.failure(table_.context_retain.name, code, "retaining the primary context of " + id_);
    }
    context_ = context;
    return context;
}

ContextScope::ContextScope(Gpu &gpu) : table_(gpu.table()) {
    Result<Context> context = gpu.context();
    if (!context.ok()) {
        status_ = context.status();
        return;
    }
    if (Code code = table_.context_get(&before_); code != kSuccess) {
        status_ = table_.failure(table_.context_get.name, code, "asking for the current context of the thread");
        return;
    }
    if (before_ == *context) return;
    if (Code code = table_.context_set(*context); code != kSuccess) {
        status_ = table_.failure(table_.context_set.name, code, "making the context of " + gpu.id() + " current");
        return;
    }
    changed_ = true;
}

ContextScope::~ContextScope() {
    // The context was current a moment ago; if it cannot be again, its owner's next call says so.
    if (changed_) static_cast<void>(table_.context_set.insist(before_));
}

}  // namespace elastickv::cuda
