// The driver contract, run over the host driver: small pages, default pages, huge pages; and through a fault switch.
#include <sys/stat.h>

#include "check.hpp"
#include "driver/faulty.hpp"
#include "driver/host.hpp"
#include "driver_contract.hpp"
#include "driver_memfd.hpp"

namespace elastickv::contract {

namespace {

std::shared_ptr<Driver> host(std::uint64_t page_bytes) {
    Result<std::shared_ptr<Driver>> driver = make_host_driver({page_bytes, std::uint64_t{256} << 20});
    if (!driver.ok()) check::fail(__FILE__, __LINE__, driver.status().message());
    return std::move(driver).value();
}

Subject subject(const char *name, std::uint64_t page_bytes) {
    return {name, [page_bytes] { return host(page_bytes); }, [](Driver &) { return memfd_bytes(); }, nullptr, nullptr};
}

Subject faulty() {
    Subject wrapped = subject("faulty around host", 64 * 1024);
    wrapped.make = [] { return std::make_shared<FaultyDriver>(host(64 * 1024)); };
    return wrapped;
}

const bool added = add_driver_contract(subject("host 4 KiB", 4096)) &&
                   add_driver_contract(subject("host 64 KiB", 64 * 1024)) &&
                   add_driver_contract(subject("host 2 MiB", std::uint64_t{2} << 20)) && add_driver_contract(faulty());

}  // namespace

}  // namespace elastickv::contract
