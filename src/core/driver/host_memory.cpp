#include "driver/host_memory.hpp"

#include <sys/sysinfo.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

namespace elastickv {

namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

std::optional<std::uint64_t> number_in(const std::string &path) {
    std::ifstream file(path);
    std::uint64_t value = 0;
    if (file >> value) return value;
    return std::nullopt;  // absent, or "max"
}

// The process's directory under the version 2 control groups; empty where there is none.
std::string own_group() {
    std::ifstream file("/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {
        if (line.starts_with("0::")) return "/sys/fs/cgroup" + line.substr(3);
    }
    return {};
}

struct GroupBytes {
    std::uint64_t limit = kUnlimited;
    std::uint64_t available = kUnlimited;
};

// The tightest of the group and its parents. Page cache counts as used there, although the kernel would drop it:
// inactive file pages are taken off, as the kernel's own MemAvailable does for the machine.
GroupBytes group_bytes() {
    GroupBytes tightest;
    std::string group = own_group();
    while (group.size() >= std::string_view("/sys/fs/cgroup").size()) {
        const auto limit = number_in(group + "/memory.max");
        const auto used = number_in(group + "/memory.current");
        if (limit && used) {
            std::uint64_t droppable = 0;
            std::ifstream stat(group + "/memory.stat");
            std::string key;
            for (std::uint64_t value = 0; stat >> key >> value;) {
                if (key == "inactive_file") droppable = value;
            }
            const std::uint64_t held = *used - std::min(*used, droppable);
            tightest.limit = std::min(tightest.limit, *limit);
            tightest.available = std::min(tightest.available, *limit - std::min(*limit, held));
        }
        group.erase(std::min(group.rfind('/'), group.size()));
    }
    return tightest;
}

std::uint64_t meminfo_available() {
    std::ifstream file("/proc/meminfo");
    for (std::string line; std::getline(file, line);) {
        constexpr std::string_view kKey = "MemAvailable:";
        if (!line.starts_with(kKey)) continue;
        const std::size_t digit = line.find_first_of("0123456789", kKey.size());
        std::uint64_t kib = 0;
        if (digit == std::string::npos) break;
        std::from_chars(line.data() + digit, line.data() + line.size(), kib);
        return kib * 1024;
    }
    return kUnlimited;  // a kernel that does not say: the allocation itself will
}

// Whether any limit applies is looked at once; a limit that is set later is the kernel's to enforce.
bool group_limited() {
    static const bool limited = group_bytes().limit != kUnlimited;
    return limited;
}

}  // namespace

std::uint64_t physical_host_bytes() {
    struct sysinfo info{};
    if (::sysinfo(&info) != 0) return group_bytes().limit;
    return std::min(std::uint64_t{info.totalram} * info.mem_unit, group_bytes().limit);
}

std::uint64_t available_host_bytes(std::uint64_t enough) {
    struct sysinfo info{};
    const std::uint64_t group = group_limited() ? group_bytes().available : kUnlimited;
    if (::sysinfo(&info) == 0) {
        // Free pages alone are a lower bound of what is available, less the kernel's small reserve.
        const std::uint64_t free = std::uint64_t{info.freeram} * info.mem_unit;
        constexpr std::uint64_t kReserve = std::uint64_t{64} << 20;
        if (free > kReserve && free - kReserve >= enough) return std::min(free - kReserve, group);
    }
    return std::min(meminfo_available(), group);
}

bool huge_memory_files() {
    std::ifstream file("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    std::string line;
    return std::getline(file, line) && line.find("[never]") == std::string::npos &&
           line.find("[deny]") == std::string::npos;
}

std::uint64_t mapped_ranges_limit() {
    constexpr std::uint64_t kKernelDefault = 65530;
    const std::uint64_t mappings = number_in("/proc/sys/vm/max_map_count").value_or(kKernelDefault);
    return (mappings - mappings / 16) / 2;
}

}  // namespace elastickv
