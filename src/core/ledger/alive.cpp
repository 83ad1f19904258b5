#include "ledger/alive.hpp"

#include <fcntl.h>

#include "ledger/text.hpp"

namespace elastickv::ledger {

namespace {
struct flock range(std::uint64_t offset, std::uint64_t length) noexcept {
    struct flock lock{};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = static_cast<off_t>(offset);
    lock.l_len = static_cast<off_t>(length);
    return lock;
}
}  // namespace

Status lock_byte(int fd, std::uint64_t offset) noexcept {
    struct flock lock = range(offset, 1);
    while (fcntl(fd, F_OFD_SETLK, &lock) != 0) {
        if (errno == EINTR) continue;
        if (errno == EAGAIN || errno == EACCES) return {Code::exists, "the byte is locked"};
        return system_error("cannot lock a byte of the ledger's files (does the file system support locks?)", errno);
    }
    return {};
}

void unlock_byte(int fd, std::uint64_t offset) noexcept {
    struct flock lock = range(offset, 1);
    lock.l_type = F_UNLCK;
    while (fcntl(fd, F_OFD_SETLK, &lock) != 0 && errno == EINTR) {
    }
}

bool locked_by_other(int fd, std::uint64_t offset, std::uint64_t length) noexcept {
    struct flock lock = range(offset, length);
    while (fcntl(fd, F_OFD_GETLK, &lock) != 0) {
        if (errno != EINTR) return true;
    }
    return lock.l_type != F_UNLCK;
}

}  // namespace elastickv::ledger
