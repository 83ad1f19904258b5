// What the CUDA driver promises beyond the contract: devices, contexts, clearing, fences, the texts of failures.
#include "driver/cuda.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "check.hpp"
#include "driver/handles.hpp"
#include "driver/registry.hpp"
#include "driver_standin.hpp"

namespace elastickv {

namespace {

using contract::standin_driver;
using contract::standin_path;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
constexpr std::uint64_t kPage = 2 * kMiB;
constexpr const char *kFirst = "GPU-10111213-1415-1617-1819-1a1b1c1d1e00";
constexpr const char *kSecond = "GPU-10111213-1415-1617-1819-1a1b1c1d1e01";
constexpr const char *kInstance = "MIG-ee111213-1415-1617-1819-1a1b1c1d1e02";

template <class T> T must(Result<T> result) {
    if (!result.ok()) check::fail(__FILE__, __LINE__, result.status().message());
    return std::move(result).value();
}
std::string code_of(const Status &status) { return code_name(status.code()); }
bool has(const Status &status, const std::string &part) { return status.message().find(part) != std::string::npos; }

std::shared_ptr<Driver> fresh(CudaOptions options = {}) {
    standin_reset(0, 0, 0, 0);
    standin_start_engine(0);
    return standin_driver(std::move(options));
}

TEST("cuda driver: devices by ordinal and by name") {
    standin_reset(0, 0, 0, 0);
    for (const auto &[device, id, ordinal] : {std::tuple{"0", kFirst, 0},
                                              {"1", kSecond, 1},
                                              {"2", kInstance, 2},
                                              {kSecond, kSecond, 1},
                                              {kInstance, kInstance, 2}}) {
        auto driver = standin_driver({.device = device});
        CHECK_EQ(driver->device_id(), std::string(id));
        CHECK_EQ(driver->ordinal(), ordinal);
        CHECK_EQ(driver->name(), std::string("cuda"));
        CHECK(!driver->on_cpu());
    }
    DriverOptions options;
    options.library = standin_path();
    CHECK_EQ(must(open_driver("cuda:1", options))->device_id(), std::string(kSecond));
    CHECK_EQ(must(open_driver("cuda", options))->device_id(), std::string(kFirst));
    CHECK_EQ(must(open_driver("GPU-10111213-1415-1617-1819-1A1B1C1D1E01", options))->ordinal(), 1);
}

TEST("cuda driver: a device that is not there lists those that are") {
    standin_reset(0, 0, 0, 0);
    const Status status = make_cuda_driver({.device = "7", .library = standin_path()}).status();
    CHECK_EQ(code_of(status), "not_found");
    CHECK_EQ(status.message(), std::string("there is no CUDA device '7' in this process; it sees 0 = ") + kFirst +
                                   ", 1 = " + kSecond + ", 2 = " + kInstance +
                                   " (CUDA_VISIBLE_DEVICES chooses what it sees)");
    CHECK_EQ(code_of(make_cuda_driver({.device = "1x", .library = standin_path()}).status()), "not_found");
}

TEST("cuda driver: no context is made unless that is allowed") {
    standin_reset(0, 0, 0, 0);
    auto driver = standin_driver({});
    CHECK_EQ(standin_context_references(0), 0);
    for (const Status &status :
         {driver->bind_thread(), driver->reserve(kPage).status(), driver->memory_info().status()}) {
        CHECK_EQ(code_of(status), "driver");
        CHECK(has(status, std::string("this process has no CUDA context on ") + kFirst + " yet"));
    }
    CHECK_EQ(standin_calls("cuDevicePrimaryCtxRetain"), 0u);
    standin_start_engine(0);
    CHECK_OK(driver->bind_thread());
    CHECK_OK(driver->bind_thread());
    CHECK_EQ(standin_context_references(0), 1);
    driver.reset();
    CHECK_EQ(standin_context_references(0), 0);
    auto allowed = standin_driver({.device = "1", .allow_context = true});
    CHECK_OK(allowed->bind_thread());
    CHECK_EQ(standin_context_references(1), 1);
}

TEST("cuda driver: calls from any thread work, and change no thread's context") {
    auto driver = fresh();
    std::string trouble;
    std::thread([&] {
        try {
            CHECK_OK(driver->memory_info());
            CHECK_OK(driver->memory_info());
            CHECK_EQ(standin_calls("cuCtxSetCurrent"), 4u);  // there and back, each time
            CHECK_OK(driver->bind_thread());
            CHECK_OK(driver->memory_info());
            CHECK_EQ(standin_calls("cuCtxSetCurrent"), 5u);
        } catch (const check::Failure &failure) {
            trouble = failure.text;
        }
    }).join();
    CHECK_EQ(trouble, std::string());
}

TEST("cuda driver: each device has its own memory") {
    auto first = fresh();
    standin_start_engine(1);
    auto second = standin_driver({.device = kSecond});
    Physical memory = must(Physical::make(second, 3 * kPage));
    CHECK_EQ(standin_used_bytes(0), 0u);
    CHECK_EQ(standin_used_bytes(1), 3 * kPage);
    CHECK_EQ(must(first->memory_info()).free_bytes, 256 * kMiB);
    CHECK_EQ(must(second->memory_info()).free_bytes, 256 * kMiB - 3 * kPage);
}

TEST("cuda driver: failures say what was tried, how much, which call, and the driver's own words") {
    auto driver = fresh();
    const Status out = driver->create(512 * kMiB).status();
    CHECK_EQ(code_of(out), "out_of_memory");
    CHECK_EQ(out.message(), std::string("creating 512 MiB of memory on ") + kFirst +
                                " failed: cuMemCreate returned CUDA_ERROR_OUT_OF_MEMORY (out of memory)");
    standin_fail("cuMemAddressReserve", 1, 1);
    const Status refused = driver->reserve(kPage).status();
    CHECK_EQ(code_of(refused), "driver");
    CHECK_EQ(refused.message(),
             std::string("reserving 2 MiB of addresses for ") + kFirst +
                 " failed: cuMemAddressReserve returned CUDA_ERROR_INVALID_VALUE (invalid argument)");
    standin_fail("cuMemGetInfo_v2", 1, 99999);
    CHECK(has(driver->memory_info().status(), "returned CUDA error 99999"));
}

// A small structure is built and taken down; every library call in it fails once, and nothing stays that is not known.
TEST("cuda driver: every library call may fail") {
    for (const char *function : {"cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async",
                                 "cuStreamCreate", "cuEventCreate", "cuEventQuery", "cuCtxGetCurrent",
                                 "cuCtxSetCurrent", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxGetState"}) {
        const std::uint64_t leaked = leaked_calls();
        auto driver = fresh();
        const auto build = [&]() -> Status {
            auto range = Reservation::make(driver, 2 * kPage);
            if (!range.ok()) return range.status();
            auto memory = Physical::make(driver, kPage);
            if (!memory.ok()) return memory.status();
            return Mapping::make(driver, range->address(), kPage, memory->id()).status();
        };
        standin_fail(function, 1, 1);
        const Status status = build();
        if (status.ok() || !has(status, function) || !has(status, "CUDA_ERROR_INVALID_VALUE")) {
            check::fail(__FILE__, __LINE__, std::string(function) + ": " + status.message());
        }
        CHECK(driver->stats() == DriverStats{});
        CHECK_EQ(standin_used_bytes(0), 0u);
        CHECK_EQ(standin_alive("reservations") + standin_alive("memory") + standin_alive("events"), 0u);
        CHECK_OK(build());
        CHECK_EQ(leaked_calls(), leaked);
    }
}

TEST("cuda driver: a clearing whose fence cannot be recorded at once is fenced later, not abandoned") {
    auto driver = fresh();
    standin_strict(1);
    Reservation range = must(Reservation::make(driver, kPage));
    Physical memory = must(Physical::make(driver, kPage));
    standin_hold_new_streams(1);
    for (int nth = 1; nth <= 3; ++nth) standin_fail("cuEventRecord", nth, 1);
    std::unique_ptr<Fence> clearing;
    Mapping mapping = must(Mapping::make(driver, range.address(), kPage, memory.id(), &clearing));
    CHECK(!clearing->done().ok());  // says so each time that it does not work
    CHECK_EQ(code_of(driver->unmap(range.address(), kPage)), "driver");
    CHECK(!must(clearing->done()));
    CHECK_EQ(code_of(driver->unmap(range.address(), kPage)), "timeout");
    standin_let_all_go();
    CHECK(must(clearing->done()));
    CHECK_OK(mapping.close());
    CHECK_EQ(standin_violations(), 0u);
}

TEST("cuda driver: an undo that the library refuses leaves everything as it was") {
    auto driver = fresh();
    Reservation range = must(Reservation::make(driver, kPage));
    Physical memory = must(Physical::make(driver, kPage));
    Mapping mapping = must(Mapping::make(driver, range.address(), kPage, memory.id()));
    const DriverStats before = driver->stats();
    standin_fail("cuMemUnmap", 1, 1);
    CHECK(has(driver->unmap(range.address(), kPage), "unmapping 2 MiB at 0x"));
    CHECK(driver->stats() == before);
    CHECK_OK(mapping.close());
    standin_fail("cuMemRelease", 1, 1);
    CHECK(has(driver->release(memory.id()), "cuMemRelease returned"));
    CHECK_OK(memory.close());
    standin_fail("cuMemAddressFree", 1, 1);
    CHECK(has(driver->free_address(range.address(), kPage), "cuMemAddressFree returned"));
    CHECK_OK(range.close());
}

TEST("cuda driver: a driver that goes takes with it what was never given back") {
    auto driver = fresh();
    const Address address = must(driver->reserve(4 * kPage));
    const PhysicalId id = must(driver->create(kPage));
    CHECK_OK(driver->map(address, kPage, id));
    CHECK_OK(driver->set_access(address, kPage));
    CHECK_EQ(standin_alive("mappings"), 1u);
    driver.reset();
    CHECK_EQ(standin_alive("mappings") + standin_alive("memory") + standin_alive("reservations"), 0u);
    CHECK_EQ(standin_alive("streams") + standin_alive("events"), 0u);
    CHECK_EQ(standin_context_references(0), 0);
}

TEST("cuda driver: a fence passes when the work before it has") {
    auto driver = fresh();
    standin_hold(nullptr, 1);
    Reservation range = must(Reservation::make(driver, kPage));
    Physical memory = must(Physical::make(driver, kPage));
    Mapping mapping = must(Mapping::make(driver, range.address(), kPage, memory.id()));
    standin_work(nullptr, range.address(), kPage);
    auto fence = must(driver->record(0));
    CHECK(!must(fence->done()));
    standin_hold(nullptr, 0);
    CHECK(must(fence->done()));
    CHECK_OK(mapping.close());
    CHECK_EQ(standin_violations(), 0u);
    CHECK(!driver->record(0xdead).ok());
}

TEST("cuda stand-in: unmapping under work is a violation") {
    auto driver = fresh();
    Reservation range = must(Reservation::make(driver, 2 * kPage));
    Physical memory = must(Physical::make(driver, kPage));
    Mapping mapping = must(Mapping::make(driver, range.address(), kPage, memory.id()));
    standin_hold(nullptr, 1);
    standin_work(nullptr, range.address() + kPage, kPage);  // another range: nothing to do with it
    Mapping other = must(Mapping::make(driver, range.address() + kPage, kPage, memory.id()));
    CHECK_OK(mapping.close());
    CHECK_EQ(standin_violations(), 0u);
    CHECK_OK(other.close());
    CHECK_EQ(standin_violations(), 1u);
    CHECK_EQ(std::string(standin_last_violation()),
             std::string("a range was unmapped with work on it that has not completed"));
    standin_let_all_go();
    CHECK_EQ(standin_violations(), 2u);  // and then the work runs on nothing
}

TEST("cuda stand-in: strict counts any unmapping before a recorded event") {
    auto driver = fresh();
    standin_strict(1);
    Reservation range = must(Reservation::make(driver, kPage));
    Physical memory = must(Physical::make(driver, kPage));
    Mapping mapping = must(Mapping::make(driver, range.address(), kPage, memory.id()));
    standin_hold(nullptr, 1);
    auto fence = must(driver->record(0));
    CHECK_OK(mapping.close());
    CHECK_EQ(standin_violations(), 1u);
    standin_let_all_go();
}

TEST("cuda driver: clearing waits for a bounded time, and the range stays until it is done") {
    auto driver = fresh({.clear_timeout_ms = 30});
    const std::uint64_t leaked = leaked_calls();
    Reservation range = must(Reservation::make(driver, kPage));
    Physical memory = must(Physical::make(driver, kPage));
    standin_hold_new_streams(1);
    CHECK_OK(driver->map(range.address(), kPage, memory.id()));
    const auto start = std::chrono::steady_clock::now();
    const Status late = driver->set_access(range.address(), kPage);
    CHECK(std::chrono::steady_clock::now() - start >= std::chrono::milliseconds(30));
    CHECK_EQ(code_of(late), "timeout");
    CHECK(has(late, "was not done after 30 ms"));
    const Status early = driver->unmap(range.address(), kPage);
    CHECK_EQ(code_of(early), "timeout");
    CHECK(has(early, "clearing it has not ended yet"));
    CHECK_EQ(standin_calls("cuMemUnmap"), 0u);
    standin_let_all_go();
    CHECK_OK(driver->unmap(range.address(), kPage));
    CHECK_EQ(standin_violations(), 0u);
    Mapping mapping = must(Mapping::make(driver, range.address(), kPage, memory.id()));
    CHECK_EQ(standin_calls("cuMemsetD8Async"), 2u);  // it was never known to be clear
    CHECK_EQ(leaked_calls(), leaked);
}

TEST("cuda driver: clearing waits while the fill takes its time") {
    auto driver = fresh({.clear_timeout_ms = 5000});
    standin_hold_new_streams(1);
    Reservation range = must(Reservation::make(driver, kPage));
    Physical memory = must(Physical::make(driver, kPage));
    std::thread gpu([] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        standin_let_all_go();
    });
    const Result<Mapping> mapping = Mapping::make(driver, range.address(), kPage, memory.id());
    gpu.join();
    CHECK_OK(mapping);
    CHECK_EQ(*reinterpret_cast<const unsigned char *>(range.address() + kPage - 1), 0);
}

TEST("cuda driver: page sizes") {
    standin_reset(0, 0, 0, 0);
    CHECK_EQ(standin_driver({})->granularity(), kPage);
    CHECK_EQ(standin_driver({.page_bytes = 8 * kMiB})->granularity(), 8 * kMiB);
    for (const std::uint64_t bytes : {kMiB, 3 * kMiB, 6 * kMiB}) {
        const Status status = make_cuda_driver({.library = standin_path(), .page_bytes = bytes}).status();
        CHECK_EQ(code_of(status), "invalid");
        CHECK(has(status, "is not the page of"));
    }
}

TEST("cuda driver: a library that cannot start says so") {
    standin_reset(0, 0, 0, 0);
    standin_fail("cuInit", 1, 100);
    const Status status = make_cuda_driver({.library = standin_path()}).status();
    CHECK_EQ(code_of(status), "not_found");
    CHECK(has(
        status,
        "cuInit returned CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected); check the GPU with nvidia-smi"));
    standin_fail("cuDeviceGetAttribute", 1, 1);
    CHECK(has(make_cuda_driver({.library = standin_path()}).status(),
              "has no virtual memory management (CUDA driver 13.0)"));
}

TEST("cuda driver: in a forked child it is refused, with what to do instead") {
    auto driver = fresh();
    CHECK_OK(driver->bind_thread());
    const std::uint64_t calls = standin_calls("cuCtxGetCurrent");
    std::fflush(nullptr);
    const pid_t child = ::fork();
    if (child == 0) {
        const bool refused = has(driver->reserve(kPage).status(), "start it with spawn") &&
                             !driver->bind_thread().ok() && !driver->record(0).ok() && !driver->memory_info().ok();
        driver.reset();
        ::_exit(refused && standin_calls("cuCtxGetCurrent") == calls ? 0 : 1);
    }
    int status = 0;
    CHECK_EQ(::waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK_OK(driver->memory_info());
}

}  // namespace

}  // namespace elastickv
