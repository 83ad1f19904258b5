// A stand-in for libnvidia-ml.so.1: the entry points that elastickv uses, told what to say by a text file.
//
// The file is named by STANDIN_NVML and read at every call, so a test changes it under a running program. Its lines:
//   gpu UUID TOTAL USED NAME...           a GPU, in the order of the bus
//   divided UUID                          it is in MIG mode
//   mig PARENT GI CI UUID TOTAL USED      a MIG instance of it
//   process UUID PID USED                 USED -1: the driver does not tell
//   hidden UUID                           this user may not use the GPU
//   fail FUNCTION CODE                    the function answers with this code
// Without the variable or the file there is no driver. Handles are lines' numbers, so nothing has to be kept.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#define STANDIN_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Handle = void *;
enum Code : int {
    kOk = 0,
    kInvalid = 2,
    kNotSupported = 3,
    kNoPermission = 4,
    kNotFound = 6,
    kTooSmall = 7,
    kDriverNotLoaded = 9
};

struct Line {
    std::string kind, uuid, parent, name;
    unsigned gpu_instance = 0, compute_instance = 0, pid = 0;
    std::uint64_t total = 0, used = 0;
    int code = 0;
};

struct Memory {
    unsigned long long total, free, used;
};
struct Process {
    unsigned pid;
    unsigned long long used;
    unsigned gpu_instance, compute_instance;
};

bool read(std::vector<Line> *lines) {
    const char *path = std::getenv("STANDIN_NVML");
    std::ifstream file(path == nullptr ? "" : path);
    if (!file) return false;
    for (std::string text; std::getline(file, text);) {
        std::istringstream words(text);
        Line line;
        words >> line.kind;
        if (line.kind == "gpu") {
            words >> line.uuid >> line.total >> line.used >> std::ws;
            std::getline(words, line.name);
        } else if (line.kind == "mig") {
            words >> line.parent >> line.gpu_instance >> line.compute_instance >> line.uuid >> line.total >> line.used;
            line.name = "an instance";
        } else if (line.kind == "process") {
            long long used = 0;
            words >> line.uuid >> line.pid >> used;
            line.used = static_cast<std::uint64_t>(used);
        } else {
            words >> line.uuid >> line.code;
        }
        lines->push_back(line);
    }
    return true;
}

// What the file says, and whether this call may go on.
class Call {
  public:
    explicit Call(const char *function) {
        if (!read(&lines)) code = kDriverNotLoaded;
        for (const Line &line : lines)
            if (line.kind == "fail" && line.uuid == function) code = line.code;
    }
    const Line *find(Handle handle) const {
        const auto number = reinterpret_cast<std::uintptr_t>(handle);
        return number == 0 || number > lines.size() ? nullptr : &lines[number - 1];
    }
    bool marked(const char *kind, const std::string &uuid) const {
        for (const Line &line : lines)
            if (line.kind == kind && line.uuid == uuid) return true;
        return false;
    }
    // The index-th line of a kind (below a parent), as a handle.
    Handle nth(const char *kind, const std::string &parent, unsigned index) const {
        for (std::size_t i = 0; i < lines.size(); ++i) {
            if (lines[i].kind == kind && lines[i].parent == parent && index-- == 0)
                return reinterpret_cast<Handle>(i + 1);
        }
        return nullptr;
    }

    std::vector<Line> lines;
    int code = kOk;
};

int copy(const std::string &text, char *out, unsigned size) {
    if (text.size() + 1 > size) return kTooSmall;
    std::memcpy(out, text.c_str(), text.size() + 1);
    return kOk;
}

}  // namespace

STANDIN_EXPORT int nvmlInitWithFlags(unsigned) { return Call("nvmlInitWithFlags").code; }
STANDIN_EXPORT int nvmlShutdown() { return kOk; }

STANDIN_EXPORT const char *nvmlErrorString(int code) {
    switch (code) {
        case kNoPermission: return "Insufficient Permissions";
        case kNotFound: return "Not Found";
        case kDriverNotLoaded: return "Driver Not Loaded";
        default: return "Unknown Error";
    }
}

STANDIN_EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
    const Call call("nvmlDeviceGetCount_v2");
    *count = 0;
    for (const Line &line : call.lines) *count += line.kind == "gpu" ? 1U : 0U;
    return call.code;
}

STANDIN_EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle *device) {
    const Call call("nvmlDeviceGetHandleByIndex_v2");
    if (call.code != kOk) return call.code;
    *device = call.nth("gpu", "", index);
    if (*device == nullptr) return kInvalid;
    return call.marked("hidden", call.find(*device)->uuid) ? kNoPermission : kOk;
}

STANDIN_EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, Handle *device) {
    const Call call("nvmlDeviceGetHandleByUUID");
    if (call.code != kOk) return call.code;
    for (std::size_t i = 0; i < call.lines.size(); ++i) {
        const Line &line = call.lines[i];
        if ((line.kind == "gpu" || line.kind == "mig") && line.uuid == uuid) {
            *device = reinterpret_cast<Handle>(i + 1);
            return kOk;
        }
    }
    return kNotFound;
}

STANDIN_EXPORT int nvmlDeviceGetUUID(Handle device, char *uuid, unsigned size) {
    const Call call("nvmlDeviceGetUUID");
    const Line *line = call.find(device);
    return call.code != kOk || line == nullptr ? (call.code != kOk ? call.code : kInvalid)
                                               : copy(line->uuid, uuid, size);
}

STANDIN_EXPORT int nvmlDeviceGetName(Handle device, char *name, unsigned size) {
    const Call call("nvmlDeviceGetName");
    const Line *line = call.find(device);
    return call.code != kOk || line == nullptr ? (call.code != kOk ? call.code : kInvalid)
                                               : copy(line->name, name, size);
}

STANDIN_EXPORT int nvmlDeviceGetMemoryInfo(Handle device, Memory *memory) {
    const Call call("nvmlDeviceGetMemoryInfo");
    const Line *line = call.find(device);
    if (call.code != kOk || line == nullptr) return call.code != kOk ? call.code : kInvalid;
    *memory = {line->total, line->total - line->used, line->used};
    return kOk;
}

STANDIN_EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(Handle device, unsigned *count, Process *processes) {
    const Call call("nvmlDeviceGetComputeRunningProcesses_v3");
    const Line *line = call.find(device);
    if (call.code != kOk || line == nullptr) return call.code != kOk ? call.code : kInvalid;
    std::vector<Process> found;
    for (const Line &other : call.lines)
        if (other.kind == "process" && other.uuid == line->uuid) found.push_back({other.pid, other.used, 0, 0});
    const bool fits = *count >= found.size();
    *count = static_cast<unsigned>(found.size());
    if (!fits) return kTooSmall;
    for (std::size_t i = 0; i < found.size(); ++i) processes[i] = found[i];
    return kOk;
}

STANDIN_EXPORT int nvmlDeviceGetMigMode(Handle device, unsigned *current, unsigned *pending) {
    const Call call("nvmlDeviceGetMigMode");
    const Line *line = call.find(device);
    if (call.code != kOk || line == nullptr) return call.code != kOk ? call.code : kInvalid;
    if (line->name.find("T4") != std::string::npos) return kNotSupported;
    *current = *pending = call.marked("divided", line->uuid) ? 1 : 0;
    return kOk;
}

STANDIN_EXPORT int nvmlDeviceGetMaxMigDeviceCount(Handle, unsigned *count) {
    *count = 7;
    return Call("nvmlDeviceGetMaxMigDeviceCount").code;
}

STANDIN_EXPORT int nvmlDeviceGetMigDeviceHandleByIndex(Handle device, unsigned index, Handle *instance) {
    const Call call("nvmlDeviceGetMigDeviceHandleByIndex");
    const Line *line = call.find(device);
    if (call.code != kOk || line == nullptr) return call.code != kOk ? call.code : kInvalid;
    *instance = call.nth("mig", line->uuid, index);
    return *instance == nullptr ? kNotFound : kOk;
}

STANDIN_EXPORT int nvmlDeviceGetGpuInstanceId(Handle device, unsigned *id) {
    const Call call("nvmlDeviceGetGpuInstanceId");
    const Line *line = call.find(device);
    if (call.code != kOk || line == nullptr) return call.code != kOk ? call.code : kInvalid;
    *id = line->gpu_instance;
    return kOk;
}

STANDIN_EXPORT int nvmlDeviceGetComputeInstanceId(Handle device, unsigned *id) {
    const Call call("nvmlDeviceGetComputeInstanceId");
    const Line *line = call.find(device);
    if (call.code != kOk || line == nullptr) return call.code != kOk ? call.code : kInvalid;
    *id = line->compute_instance;
    return kOk;
}
