// Small pieces of the ledger's messages.
#pragma once

#include <cerrno>
#include <cstdint>
#include <string>

#include "base/status.hpp"
#include "driver/text.hpp"

namespace elastickv::ledger {

// "2 s", "50 ms".
std::string human_ms(std::uint64_t ms);
std::string quoted(const std::string &text);  // in single quotes
std::string octal_mode(unsigned mode);        // "0755"

// The Status of a failed system call: `what` names the call and the file ("cannot open '/x/y'").
Status system_error(const std::string &what, int error);

}  // namespace elastickv::ledger
