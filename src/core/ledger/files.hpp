// The private directory of the ledgers, and how files in it are opened and created.
//
// Everything is opened relative to one descriptor of the checked directory, never through a symlink, and is checked
// again by its descriptor, so that nothing can be swapped between the check and the use.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "base/status.hpp"
#include "ledger/forkguard.hpp"

namespace elastickv::ledger {

class UniqueFd {
  public:
    UniqueFd() noexcept = default;
    explicit UniqueFd(int fd) noexcept : fd_(fd) {}
    UniqueFd(UniqueFd &&other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    UniqueFd &operator=(UniqueFd &&other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~UniqueFd();
    int get() const noexcept { return fd_; }
    int take() noexcept { return std::exchange(fd_, -1); }

  private:
    int fd_ = -1;
};

// A directory that is ours alone: made with mode 0700 if absent; denied if it is a symlink, another user's, or
// reachable by others. The text names the path, what was found and the remedy.
class PrivateDirectory {
  public:
    static Result<PrivateDirectory> open(const std::string &path);

    // Opens an existing file for reading and writing. not_found; denied: a symlink, no regular file, owner, mode.
    Result<UniqueFd> open_file(const std::string &name) const;
    // Creates the file (mode 0600) or opens it.
    Result<UniqueFd> open_or_create(const std::string &name) const;
    // Creates a file that must not exist, with `bytes` of zeros that are really allocated (no SIGBUS later).
    Result<UniqueFd> create_new(const std::string &name, std::uint64_t bytes) const;
    // Gives `from` the name `to` in one step where the file system can, so that no second name is left by a death in
    // between; exists when `to` is there.
    Status publish(const std::string &from, const std::string &to) const;
    Status rename(const std::string &from, const std::string &to) const;  // replaces `to` at once
    // The inode number behind the name now; 0: there is none.
    std::uint64_t inode(const std::string &name) const noexcept;
    void unlink(const std::string &name) const noexcept;
    // Removes files whose name begins with `prefix`. The caller knows that nobody uses them.
    void unlink_prefix(const std::string &prefix) const noexcept;

    std::string file_path(const std::string &name) const { return path_ + "/" + name; }
    const std::string &path() const noexcept { return path_; }

  private:
    PrivateDirectory(std::string path, UniqueFd fd) : path_(std::move(path)), fd_(std::move(fd)) {}
    Status check_file(const std::string &name, int fd) const;

    std::string path_;
    UniqueFd fd_;
};

// The directory's lock, held while files are created or replaced. Dropped by the kernel when the holder dies.
class DirectoryLock {
  public:
    // timeout when another process holds it for `deadline_ms`.
    static Result<std::unique_ptr<GuardedFd>> take(const PrivateDirectory &directory, std::uint64_t deadline_ms);
};

}  // namespace elastickv::ledger
