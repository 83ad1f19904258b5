// Sizes and addresses as people read them, for the texts of statuses.
#pragma once

#include <cstdint>
#include <new>
#include <string>

#include "base/status.hpp"

namespace elastickv {

std::string human_bytes(std::uint64_t bytes);  // "2 MiB", "1.5 GiB", "12345 bytes"
std::string hex(std::uint64_t value);          // "0x7f00a0000000"
std::string errno_text(int error);             // "ENOMEM (Cannot allocate memory)"

// Runs a body that may need heap memory for bookkeeping; running out becomes a status instead of std::terminate.
// The text is short enough to live inside the string object.
template <class Body> auto no_throw(Body &&body) noexcept -> decltype(body()) {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        return Status(Code::out_of_memory, "no heap memory");
    }
}

}  // namespace elastickv
