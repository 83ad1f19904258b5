#include "driver/host_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iterator>

#include "driver/text.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace elastickv {

namespace {

constexpr std::uint64_t kHugeBytes = std::uint64_t{2} << 20;

// A signal undoes the whole running fallocate; pieces bound what is lost, tries bound the loop.
constexpr std::uint64_t kPieceBytes = std::uint64_t{16} << 20;
constexpr int kTriesPerPiece = 1000;

int fallocate_retrying(int fd, int mode, std::uint64_t offset, std::uint64_t bytes) noexcept {
    for (int tries = 0; tries < kTriesPerPiece; ++tries) {
        if (::fallocate(fd, mode, static_cast<off_t>(offset), static_cast<off_t>(bytes)) == 0) return 0;
        if (errno != EINTR) return errno;
    }
    return EINTR;
}

}  // namespace

HostFile::~HostFile() {
    if (fd_ >= 0) ::close(fd_);
}

Status HostFile::open(bool huge) {
    huge_ = huge;
    fd_ = ::memfd_create("elastickv", MFD_CLOEXEC);
    if (fd_ >= 0) return {};
    return {Code::driver, "memfd_create for the host memory failed: " + errno_text(errno) +
                              "; the process needs a free file descriptor and a kernel with memfd (Linux 3.17)"};
}

void HostFile::add_hole(std::uint64_t offset, std::uint64_t bytes) {
    by_offset_.emplace(offset, bytes);
    by_size_.emplace(bytes, offset);
}

void HostFile::drop_hole(std::uint64_t offset, std::uint64_t bytes) {
    by_offset_.erase(offset);
    by_size_.erase({bytes, offset});
}

Result<std::uint64_t> HostFile::take_offset(std::uint64_t bytes) {
    std::lock_guard guard(mutex_);
    if (fd_ < 0) return Status(Code::driver, "create: this process is a fork of the one that opened the driver");
    if (auto fit = by_size_.lower_bound({bytes, 0}); fit != by_size_.end()) {
        const auto [hole, offset] = *fit;
        drop_hole(offset, hole);
        if (hole > bytes) add_hole(offset + bytes, hole - bytes);
        return offset;
    }
    const std::uint64_t offset = end_;
    if (offset + bytes > size_) {
        if (::ftruncate(fd_, static_cast<off_t>(offset + bytes)) != 0) {
            const int error = errno;
            return Status(error == ENOMEM || error == EFBIG ? Code::out_of_memory : Code::driver,
                          "create: growing the host memory file to " + human_bytes(offset + bytes) +
                              " failed: " + errno_text(error) + "; check the file size limit (ulimit -f)");
        }
        size_ = offset + bytes;
    }
    end_ = offset + bytes;
    return offset;
}

void HostFile::give_offset(std::uint64_t offset, std::uint64_t bytes) {
    std::lock_guard guard(mutex_);
    auto next = by_offset_.lower_bound(offset);
    if (next != by_offset_.begin()) {
        const auto [before, length] = *std::prev(next);
        if (before + length == offset) {
            drop_hole(before, length);
            offset = before;
            bytes += length;
        }
    }
    next = by_offset_.lower_bound(offset);
    if (next != by_offset_.end() && next->first == offset + bytes) {
        const std::uint64_t length = next->second;
        drop_hole(next->first, length);
        bytes += length;
    }
    if (offset + bytes == end_) {
        end_ = offset;
    } else {
        add_hole(offset, bytes);
    }
}

// What fails here leaves smaller pages to allocate(), which has the last word.
void HostFile::fault_in_huge(std::uint64_t offset, std::uint64_t bytes) const noexcept {
    void *raw = ::mmap(nullptr, bytes + kHugeBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return;
    const auto start = reinterpret_cast<std::uintptr_t>(raw);
    void *at = reinterpret_cast<void *>((start + kHugeBytes - 1) / kHugeBytes * kHugeBytes);
    bool mapped = false;
    {
        std::lock_guard guard(mutex_);  // a mapping of the file must not be forked before it is marked
        mapped = ::mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd_, static_cast<off_t>(offset)) !=
                     MAP_FAILED &&
                 ::madvise(at, bytes, MADV_DONTFORK) == 0;
    }
    if (mapped && ::madvise(at, bytes, MADV_HUGEPAGE) == 0) ::madvise(at, bytes, MADV_POPULATE_WRITE);
    ::munmap(raw, bytes + kHugeBytes);
}

int HostFile::allocate(std::uint64_t offset, std::uint64_t bytes) const noexcept {
    if (huge_) fault_in_huge(offset, bytes);
    for (std::uint64_t done = 0; done < bytes; done += kPieceBytes) {
        const int error = fallocate_retrying(fd_, 0, offset + done, std::min(kPieceBytes, bytes - done));
        if (error != 0) return error;
    }
    return 0;
}

int HostFile::punch(std::uint64_t offset, std::uint64_t bytes) const noexcept {
    return fallocate_retrying(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, bytes);
}

Result<std::uint64_t> HostFile::take(std::uint64_t bytes) {
    Result<std::uint64_t> offset = take_offset(bytes);
    if (!offset.ok()) return offset;
    const int error = allocate(*offset, bytes);
    if (error == 0) return offset;
    std::string text = "create: allocating " + human_bytes(bytes) + " of host memory failed: " + errno_text(error);
    if (const int undo = punch(*offset, bytes); undo != 0) {
        // The range stays taken: handing it out again could show old bytes.
        return Status(Code::driver, text + "; giving the part that was allocated back failed too: " + errno_text(undo));
    }
    give_offset(*offset, bytes);
    const bool out = error == ENOSPC || error == ENOMEM;
    return Status(out ? Code::out_of_memory : Code::driver,
                  text + (out ? "; lower the budget, or free memory on this machine" : ""));
}

Status HostFile::give(std::uint64_t offset, std::uint64_t bytes) {
    if (const int error = punch(offset, bytes); error != 0) {
        return {Code::driver, "release: giving " + human_bytes(bytes) + " of host memory back to the kernel failed: " +
                                  errno_text(error) + "; the memory stays created"};
    }
    give_offset(offset, bytes);
    return {};
}

void HostFile::close_in_child() noexcept {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
}

}  // namespace elastickv
