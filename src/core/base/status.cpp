#include "base/status.hpp"

namespace elastickv {

const char *code_name(Code code) noexcept {
    switch (code) {
        case Code::ok: return "ok";
        case Code::unavailable: return "unavailable";
        case Code::out_of_memory: return "out_of_memory";
        case Code::limit: return "limit";
        case Code::invalid: return "invalid";
        case Code::not_found: return "not_found";
        case Code::exists: return "exists";
        case Code::denied: return "denied";
        case Code::corrupt: return "corrupt";
        case Code::timeout: return "timeout";
        case Code::driver: return "driver";
        case Code::integrity: return "integrity";
    }
    return "unknown";
}

}  // namespace elastickv
