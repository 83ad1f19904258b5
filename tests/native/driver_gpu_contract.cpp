// The driver contract, run over the CUDA driver on this machine's first GPU; where there is none, each test says so.
#include <dlfcn.h>

#include "check.hpp"
#include "driver/cuda.hpp"
#include "driver_contract.hpp"

namespace elastickv::contract {

namespace {

using CopyIn = int (*)(unsigned long long, const void *, std::size_t);
using CopyOut = int (*)(void *, unsigned long long, std::size_t);

template <class Function> Function symbol(const char *name) {
    void *library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    CHECK(library != nullptr);
    auto found = reinterpret_cast<Function>(::dlsym(library, name));
    CHECK(found != nullptr);
    return found;
}

Subject gpu() {
    Subject subject;
    subject.name = "cuda GPU";
    subject.make = []() -> std::shared_ptr<Driver> {
        Result<std::shared_ptr<Driver>> driver = make_cuda_driver({.allow_context = true});
        if (!driver.ok() && driver.status().code() == Code::not_found) return nullptr;
        if (!driver.ok()) check::fail(__FILE__, __LINE__, driver.status().message());
        const Status bound = (*driver)->bind_thread();
        if (!bound.ok()) check::fail(__FILE__, __LINE__, bound.message());
        return *driver;
    };
    subject.held = [](Driver &driver) {
        const Result<MemoryInfo> info = driver.memory_info();
        if (!info.ok()) check::fail(__FILE__, __LINE__, info.status().message());
        return info.value().total_bytes - info.value().free_bytes;
    };
    subject.write = [](Address address, const void *from, std::uint64_t bytes) {
        CHECK_EQ(symbol<CopyIn>("cuMemcpyHtoD_v2")(address, from, bytes), 0);
    };
    subject.read = [](Address address, void *to, std::uint64_t bytes) {
        CHECK_EQ(symbol<CopyOut>("cuMemcpyDtoH_v2")(to, address, bytes), 0);
    };
    return subject;
}

const bool added = add_driver_contract(gpu());

}  // namespace

}  // namespace elastickv::contract
