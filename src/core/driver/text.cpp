#include "driver/text.hpp"

#include <array>
#include <cstdio>
#include <cstring>

namespace elastickv {

std::string human_bytes(std::uint64_t bytes) {
    static constexpr std::array<const char *, 5> kUnits = {"KiB", "MiB", "GiB", "TiB", "PiB"};
    if (bytes < 1024) return std::to_string(bytes) + " bytes";
    std::size_t unit = 0;
    std::uint64_t divisor = 1024;
    while (unit + 1 < kUnits.size() && bytes / divisor >= 1024) {
        divisor *= 1024;
        ++unit;
    }
    if (bytes % divisor == 0) return std::to_string(bytes / divisor) + " " + kUnits[unit];
    std::array<char, 64> buffer{};
    std::snprintf(buffer.data(), buffer.size(), "%.2f %s (%llu bytes)",
                  static_cast<double>(bytes) / static_cast<double>(divisor), kUnits[unit],
                  static_cast<unsigned long long>(bytes));
    return buffer.data();
}

std::string hex(std::uint64_t value) {
    std::array<char, 32> buffer{};
    std::snprintf(buffer.data(), buffer.size(), "0x%llx", static_cast<unsigned long long>(value));
    return buffer.data();
}

std::string errno_text(int error) {
    const char *name = strerrorname_np(error);
    const char *text = strerrordesc_np(error);
    if (name == nullptr || text == nullptr) return "errno " + std::to_string(error);
    return std::string(name) + " (" + text + ")";
}

}  // namespace elastickv
