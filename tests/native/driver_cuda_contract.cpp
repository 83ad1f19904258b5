// The driver contract, run over the CUDA driver: on the stand-in library, and through a fault switch.
#include "check.hpp"
#include "driver/cuda.hpp"
#include "driver/faulty.hpp"
#include "driver_contract.hpp"
#include "driver_standin.hpp"

namespace elastickv::contract {

namespace {

Subject subject(const char *name, std::uint64_t granularity, std::uint64_t page_bytes) {
    Subject made;
    made.name = name;
    made.make = [=] {
        standin_reset(0, 0, granularity, 0);
        standin_start_engine(0);
        return standin_driver({.device = "0", .library = {}, .page_bytes = page_bytes});
    };
    made.held = [](Driver &) { return standin_used_bytes(0); };
    return made;
}

Subject faulty() {
    Subject wrapped = subject("faulty around cuda stand-in", 65536, 0);
    wrapped.make = [make = wrapped.make] { return std::make_shared<FaultyDriver>(make()); };
    return wrapped;
}

const bool added = add_driver_contract(subject("cuda stand-in 64 KiB", 65536, 0)) &&
                   add_driver_contract(subject("cuda stand-in 2 MiB", 0, 0)) &&
                   add_driver_contract(subject("cuda stand-in 2 MiB, pages of 4 MiB", 0, std::uint64_t{4} << 20)) &&
                   add_driver_contract(faulty());

}  // namespace

}  // namespace elastickv::contract
