// Drivers for Python: opening, looking, and the fault switch for tests.
#include "driver/driver.hpp"

#include <nanobind/stl/map.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>

#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "convert.hpp"
#include "driver/faulty.hpp"
#include "driver/handles.hpp"
#include "driver/registry.hpp"

namespace elastickv::py {

namespace {

using namespace nb::literals;

Result<elastickv::Code> code_from_name(const std::string &name) {
    std::string known;
    for (int i = 1; i <= static_cast<int>(Code::driver); ++i) {
        const auto code = static_cast<Code>(i);
        if (name == code_name(code)) return code;
        known += (known.empty() ? "" : ", ") + std::string(code_name(code));
    }
    return Status(Code::invalid, "there is no status code named '" + name + "'; the codes are " + known);
}

std::shared_ptr<Driver> open(const std::string &device, std::uint64_t page_bytes, std::uint64_t total_bytes,
                             const std::string &library, bool allow_context) {
    const DriverOptions options{page_bytes, total_bytes, library, allow_context};
    auto opened = [&] {
        const Unlocked unlocked;  // loading and starting a driver library takes long
        return open_driver(device, options);
    }();
    return unwrap(std::move(opened));
}

std::map<std::string, std::uint64_t> stats(const Driver &driver) {
    const DriverStats now = driver.stats();
    return {{"reservations", now.reservations}, {"reserved_bytes", now.reserved_bytes},
            {"physicals", now.physicals},       {"created_bytes", now.created_bytes},
            {"mappings", now.mappings},         {"mapped_bytes", now.mapped_bytes}};
}

void bind_base(nb::module_ &module) {
    nb::class_<Driver>(module, "Driver", "A device's driver. Thread-safe.")
        .def_prop_ro("name", &Driver::name, "\"host\" or \"cuda\".")
        .def_prop_ro("device_id", &Driver::device_id, "\"host\" or the GPU's UUID.")
        .def_prop_ro("granularity", &Driver::granularity, "The page, in bytes.")
        .def_prop_ro("on_cpu", &Driver::on_cpu, "Whether its memory is CPU memory.")
        .def_prop_ro("ordinal", &Driver::ordinal, "The device number that DLPack gives it.")
        .def(
            "memory_info",
            [](Driver &driver) {
                const MemoryInfo info = unwrap(driver.memory_info());
                return std::make_tuple(info.free_bytes, info.total_bytes);
            },
            "(free, total) of the device, in bytes.")
        .def("stats", &stats, "What the driver holds now: counts, and bytes.");
    module.def(
        "open_driver", &open, "device"_a, "page_bytes"_a = 0, "total_bytes"_a = 0, "library"_a = "",
        "allow_context"_a = false,
        "Opens \"host\", \"cuda:<ordinal>\", \"GPU-<uuid>\" or \"MIG-<uuid>\". Sizes in bytes; 0 is the default.");
    module.def("leaked_calls", &leaked_calls,
               "How many calls that give something back have failed unseen in this process.");
}

void bind_faulty(nb::module_ &module) {
    nb::class_<FaultyDriver, Driver>(module, "FaultyDriver",
                                     "Fails or delays chosen calls of another driver. For tests.")
        .def(
            "fail",
            [](FaultyDriver &driver, const std::string &call, std::uint64_t nth, const std::string &code) {
                const Code failure = unwrap(code_from_name(code));
                driver.fail(unwrap(call_from_name(call)), nth, Status(failure, "injected failure of " + call));
            },
            "call"_a, "nth"_a = 1, "code"_a = "driver", "The nth such call from now fails.")
        .def(
            "fail_every",
            [](FaultyDriver &driver, const std::string &call, std::uint64_t k) {
                driver.fail_every(unwrap(call_from_name(call)), k);
            },
            "call"_a, "k"_a, "Every kth such call from now fails; 0 ends it.")
        .def(
            "delay",
            [](FaultyDriver &driver, const std::string &call, std::uint64_t nth, std::uint64_t microseconds) {
                driver.delay(unwrap(call_from_name(call)), nth, microseconds);
            },
            "call"_a, "nth"_a, "microseconds"_a, "The nth such call from now sleeps first; nth 0: each does.")
        .def("heal", &FaultyDriver::heal, "Takes all orders back.")
        .def(
            "counts",
            [](const FaultyDriver &driver) {
                std::map<std::string, std::uint64_t> named;
                const FaultyDriver::Counts counts = driver.counts();
                for (std::size_t i = 0; i < counts.size(); ++i)
                    named.emplace(call_name(static_cast<Call>(i)), counts.at(i));
                return named;
            },
            "Calls so far, by name; the failed ones included.")
        .def("manual_fences", &FaultyDriver::manual_fences, "on"_a, "Whether fences pass only by complete_fences().")
        .def("pending_fences", &FaultyDriver::pending_fences, "Manual fences that have not passed.")
        .def("complete_fences", &FaultyDriver::complete_fences, "count"_a = ~std::uint64_t{0},
             "Lets the oldest manual fences pass; returns how many.");
    module.def(
        "faulty", [](std::shared_ptr<Driver> driver) { return std::make_shared<FaultyDriver>(std::move(driver)); },
        "driver"_a, "Wraps a driver in one that can be told to fail.");
}

}  // namespace

void bind_driver(nb::module_ &module) {
    bind_base(module);
    bind_faulty(module);
}

}  // namespace elastickv::py
