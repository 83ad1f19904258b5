#include "ledger/text.hpp"

#include <array>
#include <cstdio>

namespace elastickv::ledger {

std::string human_ms(std::uint64_t ms) {
    if (ms >= 1000 && ms % 1000 == 0) return std::to_string(ms / 1000) + " s";
    return std::to_string(ms) + " ms";
}

std::string quoted(const std::string &text) {
    std::string out = "'";
    out += text;
    out += '\'';
    return out;
}

std::string octal_mode(unsigned mode) {
    std::array<char, 16> text{};
    std::snprintf(text.data(), text.size(), "0%03o", mode & 07777U);
    return text.data();
}

Status system_error(const std::string &what, int error) {
    const std::string text = what + ": " + errno_text(error);
    switch (error) {
        case EACCES:
        case EPERM:
        case EROFS: return {Code::denied, text + "; check the owner and the mode"};
        case ENOENT:
        case ENOTDIR: return {Code::not_found, text};
        case ENOSPC:
        case EDQUOT: return {Code::unavailable, text + "; free some space there or set another directory"};
        case EMFILE:
        case ENFILE: return {Code::unavailable, text + "; raise the limit of open files"};
        default: return {Code::driver, text};
    }
}

}  // namespace elastickv::ledger
