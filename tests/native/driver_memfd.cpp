#include "driver_memfd.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>

#include "check.hpp"

namespace elastickv::contract {

namespace {

std::string proc(pid_t pid) { return "/proc/" + (pid == 0 ? std::string("self") : std::to_string(pid)); }

void each_memfd(pid_t pid, const std::function<void(const std::string &)> &visit) {
    for (const auto &entry : std::filesystem::directory_iterator(proc(pid) + "/fd")) {
        std::error_code error;
        const std::string target = std::filesystem::read_symlink(entry.path(), error).string();
        if (!error && target.starts_with("/memfd:elastickv")) visit(entry.path().string());
    }
}

}  // namespace

std::uint64_t memfd_bytes(pid_t pid) {
    std::uint64_t bytes = 0;
    each_memfd(pid, [&](const std::string &path) {
        struct stat info{};
        if (::stat(path.c_str(), &info) != 0) check::fail(__FILE__, __LINE__, "cannot stat " + path);
        bytes += static_cast<std::uint64_t>(info.st_blocks) * 512;
    });
    return bytes;
}

int memfd_count(pid_t pid) {
    int count = 0;
    each_memfd(pid, [&](const std::string &) { ++count; });
    return count;
}

Smaps memfd_smaps(pid_t pid) {
    std::ifstream file(proc(pid) + "/smaps");
    CHECK(file.is_open());
    Smaps sum;
    bool ours = false;
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string key;
        std::uint64_t kib = 0;
        words >> key;
        if (key.find('-') != std::string::npos && key.back() != ':')
            ours = line.find("/memfd:elastickv") != std::string::npos;
        if (!ours || !(words >> kib)) continue;
        if (key == "Size:") sum.size += kib * 1024;
        if (key == "Rss:") sum.rss += kib * 1024;
    }
    return sum;
}

}  // namespace elastickv::contract
