// From Status to Python: every failure becomes the exception that elastickv.errors has for its code.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "base/status.hpp"

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

void bind_driver(nb::module_ &module);
void bind_ledger(nb::module_ &module);
void bind_pool(nb::module_ &module);
void bind_rank(nb::module_ &module);

}  // namespace elastickv::py
