// What the host driver promises beyond the contract: the kernel's accounting, budgets, forks, reuse of file ranges.
#include "driver/host.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <thread>
#include <vector>

#include "check.hpp"
#include "driver/handles.hpp"
#include "driver/host_file.hpp"
#include "driver/host_memory.hpp"
#include "driver_memfd.hpp"

namespace elastickv {

namespace {

constexpr std::uint64_t kPage = 64 * 1024;
constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

std::shared_ptr<Driver> open_host(std::uint64_t total = 256 * kMiB) {
    Result<std::shared_ptr<Driver>> driver = make_host_driver({kPage, total});
    if (!driver.ok()) check::fail(__FILE__, __LINE__, driver.status().message());
    return std::move(driver).value();
}
template <class T> T must(Result<T> result) {
    if (!result.ok()) check::fail(__FILE__, __LINE__, result.status().message());
    return std::move(result).value();
}
void fill(Address address, int value, std::uint64_t bytes) {
    std::memset(reinterpret_cast<void *>(static_cast<std::uintptr_t>(address)), value, bytes);
}
bool refused(const HostOptions &options, const char *text) {
    const Status status = make_host_driver(options).status();
    return status.code() == Code::invalid && status.message().find(text) != std::string::npos;
}

TEST("host driver: the kernel counts exactly what is mapped") {
    auto driver = open_host();
    Reservation range = must(Reservation::make(driver, std::uint64_t{64} << 30));
    CHECK_EQ(contract::memfd_smaps().size, 0u);
    Physical one = must(Physical::make(driver, 4 * kMiB));
    Physical two = must(Physical::make(driver, 3 * kPage));
    CHECK_EQ(contract::memfd_smaps().size, 0u);  // created, not mapped
    CHECK_EQ(contract::memfd_bytes(), 4 * kMiB + 3 * kPage);
    Mapping first = must(Mapping::make(driver, range.address() + 10 * kMiB, 4 * kMiB, one.id()));
    Mapping second = must(Mapping::make(driver, range.address() + 30 * kMiB, 3 * kPage, two.id()));
    CHECK_EQ(contract::memfd_smaps().size, 4 * kMiB + 3 * kPage);
    CHECK_EQ(contract::memfd_smaps().rss, 4 * kMiB + 3 * kPage);  // without any access
    CHECK_OK(first.close());
    CHECK_EQ(contract::memfd_smaps().rss, 3 * kPage);
    CHECK_EQ(contract::memfd_bytes(), 4 * kMiB + 3 * kPage);
    CHECK_OK(one.close());
    CHECK_EQ(contract::memfd_bytes(), 3 * kPage);
}

TEST("host driver: addresses of 2 MiB and more are aligned to 2 MiB") {
    auto driver = open_host();
    for (int i = 0; i < 8; ++i) {
        Reservation small = must(Reservation::make(driver, kPage));
        Reservation large = must(Reservation::make(driver, 2 * kMiB + kPage));
        CHECK_EQ(large.address() % (2 * kMiB), 0u);
        CHECK_EQ(small.address() % kPage, 0u);
    }
}

TEST("host driver: the budget is the budget, to the byte") {
    auto driver = open_host(4 * kMiB);
    std::vector<Physical> held;
    for (int i = 0; i < 4; ++i) held.push_back(must(Physical::make(driver, kMiB)));
    const Result<PhysicalId> refusal = driver->create(kPage);
    CHECK(refusal.status().code() == Code::out_of_memory);
    CHECK_EQ(refusal.status().message(),
             std::string("create: 64 KiB of host memory do not fit: 4 MiB of this driver's 4 MiB are created; "
                         "release some, or open the driver with more total_bytes"));
    CHECK_EQ(must(driver->memory_info()).free_bytes, 0u);
    CHECK_EQ(must(driver->memory_info()).total_bytes, 4 * kMiB);
    held.pop_back();
    CHECK_EQ(must(driver->memory_info()).free_bytes, kMiB);
    held.push_back(must(Physical::make(driver, kMiB)));
    CHECK_EQ(contract::memfd_bytes(), 4 * kMiB);
}

TEST("host driver: more than the machine has is refused before the kernel has to kill") {
    const std::uint64_t total = std::uint64_t{1} << 50;
    auto driver = open_host(total);
    const std::uint64_t available = available_host_bytes(total);
    CHECK(available > 0 && available <= physical_host_bytes());
    const Result<PhysicalId> refusal = driver->create((available + (std::uint64_t{1} << 30)) / kPage * kPage);
    CHECK(refusal.status().code() == Code::out_of_memory);
    CHECK(refusal.status().message().find("the machine has") != std::string::npos);
    CHECK_EQ(contract::memfd_bytes(), 0u);
    CHECK_EQ(must(make_host_driver({kPage, 0}))->stats().created_bytes, 0u);
}

TEST("host driver: bad options are named") {
    CHECK(refused({0, kMiB}, "page_bytes of 0"));
    CHECK(refused({4097, kMiB}, "page_bytes of 4097"));
    CHECK(refused({kMiB, kPage}, "total_bytes of 64 KiB"));
    CHECK(make_host_driver({12288, kMiB}).ok());
}

TEST("host driver: pages that are no power of two") {
    constexpr std::uint64_t kOdd = 3 * 4096;
    auto driver = must(make_host_driver({kOdd, 64 * kMiB}));
    Reservation range = must(Reservation::make(driver, 1000 * kOdd));
    CHECK_EQ(range.address() % kOdd, 0u);
    Physical memory = must(Physical::make(driver, 7 * kOdd));
    Mapping mapping = must(Mapping::make(driver, range.address() + 11 * kOdd, 7 * kOdd, memory.id()));
    fill(mapping.address(), 1, mapping.bytes());
    CHECK_EQ(contract::memfd_smaps().rss, 7 * kOdd);
}

TEST("host driver: the file does not grow while holes fit") {
    HostFile file;
    CHECK_OK(file.open());
    std::vector<std::uint64_t> offsets;
    for (int i = 0; i < 8; ++i) offsets.push_back(must(file.take(kMiB)));
    for (std::uint64_t i = 0; i < 8; ++i) CHECK_EQ(offsets[i], i * kMiB);
    for (const std::size_t i : {1u, 3u, 2u, 6u}) CHECK_OK(file.give(offsets[i], kMiB));  // 1-3 join, 6 stands alone
    CHECK_EQ(must(file.take(kMiB)), 6 * kMiB);                                           // the smallest hole that fits
    CHECK_EQ(must(file.take(2 * kMiB)), 1 * kMiB);
    CHECK_EQ(must(file.take(2 * kMiB)), 8 * kMiB);  // no hole: the end
    CHECK_EQ(must(file.take(kMiB)), 3 * kMiB);
    for (const auto &[offset, mib] : {std::pair{0, 1}, {1, 2}, {3, 1}, {4, 1}, {5, 1}, {6, 1}, {7, 1}, {8, 2}}) {
        CHECK_OK(file.give(static_cast<std::uint64_t>(offset) * kMiB, static_cast<std::uint64_t>(mib) * kMiB));
    }
    CHECK_EQ(must(file.take(10 * kMiB)), 0u);  // everything has joined again
    CHECK_EQ(contract::memfd_bytes(), 10 * kMiB);
}

TEST("host driver: memory that is faulted in, for huge pages, is whole, zero, and mapped nowhere") {
    HostFile file;
    CHECK_OK(file.open(true));
    for (int round = 0; round < 2; ++round) {
        const std::uint64_t first = must(file.take(4 * kMiB)), second = must(file.take(2 * kMiB));
        CHECK_EQ(first % (2 * kMiB), 0u);
        CHECK_EQ(contract::memfd_bytes(), 6 * kMiB);
        CHECK_EQ(contract::memfd_smaps().size, 0u);
        std::vector<unsigned char> bytes(6 * kMiB, 1);
        CHECK_EQ(::pread(file.fd(), bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
        CHECK(std::all_of(bytes.begin(), bytes.end(), [](unsigned char byte) { return byte == 0; }));
        std::fill(bytes.begin(), bytes.end(), 7);
        CHECK_EQ(::pwrite(file.fd(), bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
        CHECK_OK(file.give(first, 4 * kMiB));
        CHECK_EQ(contract::memfd_bytes(), 2 * kMiB);
        CHECK_OK(file.give(second, 2 * kMiB));
    }
    CHECK_EQ(contract::memfd_bytes(), 0u);
}

TEST("host driver: a driver that goes takes with it what was never given back") {
    std::uint64_t address = 0;
    {
        auto driver = open_host();
        address = must(driver->reserve(4 * kMiB));
        const PhysicalId id = must(driver->create(kMiB));
        CHECK_OK(driver->map(address, kMiB, id));
        CHECK_OK(driver->set_access(address, kMiB));
        CHECK_EQ(contract::memfd_smaps().rss, kMiB);
    }
    CHECK_EQ(contract::memfd_smaps().size, 0u);
    CHECK_EQ(contract::memfd_count(), 0);
    unsigned char resident = 0;
    CHECK(::mincore(reinterpret_cast<void *>(address), 4096, &resident) != 0);  // not even addresses are left
}

// Forks a child that sleeps until the returned end of a pipe is closed.
struct Sleeper {
    pid_t pid = -1;
    int hold = -1;
    Sleeper() {
        int ends[2] = {-1, -1};
        CHECK_EQ(::pipe(ends), 0);
        std::fflush(nullptr);
        pid = ::fork();
        if (pid == 0) {
            ::close(ends[1]);
            char byte = 0;
            pollfd waiting{ends[0], POLLIN, 0};
            if (::poll(&waiting, 1, 20000) == 1) byte = static_cast<char>(::read(ends[0], &byte, 1));
            ::_exit(byte);
        }
        ::close(ends[0]);
        hold = ends[1];
    }
    ~Sleeper() {
        ::close(hold);
        ::waitpid(pid, nullptr, 0);
    }
    Sleeper(const Sleeper &) = delete;
    Sleeper &operator=(const Sleeper &) = delete;
};

TEST("host driver: a forked child holds none of the memory") {
    auto driver = open_host();
    Reservation range = must(Reservation::make(driver, 64 * kMiB));
    Physical memory = must(Physical::make(driver, 8 * kMiB));
    Mapping mapping = must(Mapping::make(driver, range.address(), 8 * kMiB, memory.id()));
    fill(range.address(), 7, 8 * kMiB);
    Sleeper child;
    CHECK_EQ(contract::memfd_count(), 1);
    // The handler runs before fork() returns in the child, which may be a moment after it returned here.
    for (int i = 0; i < 500 && contract::memfd_count(child.pid) != 0; ++i) ::usleep(10000);
    CHECK_EQ(contract::memfd_count(child.pid), 0);
    CHECK_EQ(contract::memfd_smaps(child.pid).size, 0u);
    CHECK_EQ(contract::memfd_smaps().rss, 8 * kMiB);
    CHECK_OK(mapping.close());
    CHECK_OK(memory.close());
    CHECK_EQ(contract::memfd_bytes(), 0u);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// The exit code of a child, or -1 if it was ended by a signal or did not end within ten seconds (then it is killed).
int exit_code_of(pid_t child) {
    int status = 0;
    for (int i = 0; i < 2000; ++i) {
        if (::waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    ::kill(child, SIGKILL);
    ::waitpid(child, &status, 0);
    return -1;
}

// Not under sanitizers: the child allocates, and their allocators are not safe in a child forked beside busy threads.
TEST("host driver: children forked while another thread maps hold nothing either") {
    auto driver = open_host();
    std::atomic<bool> stop{false};
    std::atomic<bool> healthy{true};
    std::thread mapper([&] {
        auto range = Reservation::make(driver, 16 * kPage);
        while (!stop && range.ok()) {
            auto memory = Physical::make(driver, kPage);
            auto mapping = memory.ok() ? Mapping::make(driver, range->address(), kPage, memory->id()) : memory.status();
            if (!mapping.ok()) healthy = false;
        }
    });
    int bad = 0;
    for (int i = 0; i < 60; ++i) {
        std::fflush(nullptr);
        const pid_t child = ::fork();
        if (child == 0) {
            bool clean = true;
            try {
                clean = contract::memfd_count() == 0 && contract::memfd_smaps().size == 0;
            } catch (const check::Failure &) {
                clean = false;
            }
            ::_exit(clean && !driver->create(kPage).ok() ? 0 : 1);
        }
        if (exit_code_of(child) != 0) ++bad;
    }
    stop = true;
    mapper.join();
    CHECK_EQ(bad, 0);
    CHECK(healthy.load());
    CHECK(driver->stats() == DriverStats{});
}
#endif

// Maps as many single pages as there may be, with or without gaps, then unmaps every other one and then the rest.
// Returns what went wrong, 0 for nothing. Without gaps the kernel joins them into one mapping, which unmapping tears
// apart again.
int exhaust_mappings(std::uint64_t stride) {
    constexpr std::uint64_t kSmall = 4096;
    const std::uint64_t limit = mapped_ranges_limit();
    Result<std::shared_ptr<Driver>> made = make_host_driver({kSmall, std::uint64_t{1} << 30});
    if (!made.ok()) return 1;
    const std::shared_ptr<Driver> driver = *made;
    Result<Address> start = driver->reserve(stride * kSmall * (limit + 1));
    if (!start.ok()) return 2;
    for (std::uint64_t i = 0; i <= limit; ++i) {
        Result<PhysicalId> id = driver->create(kSmall);
        if (!id.ok()) return 3;
        const Status status = driver->map(*start + stride * kSmall * i, kSmall, *id);
        if (i < limit && !status.ok()) return 4;
        if (i < limit) continue;
        if (status.code() != Code::out_of_memory || status.message().find("vm.max_map_count") == std::string::npos)
            return 5;
    }
    if (driver->stats().mappings != limit) return 6;
    for (const std::uint64_t first : {0, 1}) {
        for (std::uint64_t i = first; i < limit; i += 2) {
            if (!driver->unmap(*start + stride * kSmall * i, kSmall).ok()) return first == 0 ? 7 : 8;
        }
    }
    return driver->stats().mappings == 0 ? 0 : 9;
}

TEST("host driver: running out of mappings is an answer, and giving back still works") {
    if (mapped_ranges_limit() > 100000) {
        std::printf("      skipped: %llu ranges may be mapped here\n",
                    static_cast<unsigned long long>(mapped_ranges_limit()));
        return;
    }
    for (const std::uint64_t stride : {1, 2}) {
        std::fflush(nullptr);
        const pid_t child = ::fork();
        if (child == 0) ::_exit(exhaust_mappings(stride));
        int status = 0;
        CHECK_EQ(::waitpid(child, &status, 0), child);
        CHECK(WIFEXITED(status));
        CHECK_EQ(WEXITSTATUS(status), 0);
    }
}

TEST("host driver: the fence has always passed") {
    auto driver = open_host();
    auto fence = must(driver->record(12345));
    CHECK(must(fence->done()));
}

}  // namespace

}  // namespace elastickv
