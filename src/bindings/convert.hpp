// From Status to Python: every failure becomes the exception that elastickv.errors has for its code.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "base/status.hpp"
#include "gil.hpp"

namespace elastickv::py {

namespace nb = nanobind;

[[noreturn]] void raise(const Status &status);

inline void check(const Status &status) {
    if (!status.ok()) raise(status);
}
template <class T> T unwrap(Result<T> result) {
    if (!result.ok()) raise(result.status());
    return std::move(result).value();
}

// Runs C++ that may wait with the GIL released; the Status it returns is turned into an exception outside.
template <class F> auto without_gil(F &&work) {
    const Unlocked unlocked;
    return work();
}

void bind_driver(nb::module_ &module);
void bind_ledger(nb::module_ &module);
void bind_pool(nb::module_ &module);
void bind_rank(nb::module_ &module);

}  // namespace elastickv::py
