// What every driver must do. An implementation registers itself with one Subject; see driver_host_contract.cpp.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "driver/driver.hpp"

namespace elastickv::contract {

struct Subject {
    std::string name;
    // A fresh driver that may create at least 64 MiB, or null where this machine has no such device (then it says so).
    std::function<std::shared_ptr<Driver>()> make;
    // Bytes of memory that the kernel or device counts as held by this driver alone; absent where nobody can tell.
    std::function<std::uint64_t(Driver &)> held;
    // How bytes get in and out; absent where the addresses are the CPU's own.
    std::function<void(Address, const void *, std::uint64_t)> write;
    std::function<void(Address, void *, std::uint64_t)> read;
};

// Adds the whole suite under "driver contract: <name>: …". Always returns true, to be called from a static initialiser.
bool add_driver_contract(const Subject &subject);

// Whether the kernel refuses to read this address (EFAULT); no signal is raised.
bool unreadable(Address address);

}  // namespace elastickv::contract
