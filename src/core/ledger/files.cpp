#include "ledger/files.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include <cerrno>

#include "base/faultpoint.hpp"
#include "ledger/alive.hpp"
#include "ledger/clock.hpp"
#include "ledger/text.hpp"

namespace elastickv::ledger {

namespace {

constexpr const char *kLockName = ".lock";

// "owned by user 1000": numbers, because a name service may be slow or absent.
std::string user(unsigned uid) { return "user " + std::to_string(uid); }

Status check_directory(const std::string &path, const struct stat &found) {
    const std::string what = "the ledger directory '" + path + "' ";
    if (S_ISLNK(found.st_mode)) return {Code::denied, what + "is a symlink; name the directory itself"};
    if (!S_ISDIR(found.st_mode)) return {Code::denied, what + "is no directory; remove it or set another one"};
    if (found.st_uid != geteuid()) {
        return {Code::denied, what + "belongs to " + user(found.st_uid) + ", this process runs as " + user(geteuid()) +
                                  "; set a directory of your own"};
    }
    if ((found.st_mode & 077U) != 0) {
        return {Code::denied, what + "has mode " + octal_mode(found.st_mode) +
                                  ", so others can reach it; make it private: chmod 700 '" + path + "'"};
    }
    return {};
}

}  // namespace

UniqueFd::~UniqueFd() {
    if (fd_ >= 0) close(fd_);
}

Result<PrivateDirectory> PrivateDirectory::open(const std::string &given) {
    std::string path = given;
    while (path.size() > 1 && path.back() == '/') path.pop_back();  // lstat("link/") would follow the link
    if (path.empty()) return Status{Code::invalid, "the ledger directory is empty; set it to a private directory"};
    if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
        return system_error("cannot make the ledger directory '" + path + "'", errno);
    }
    struct stat found{};
    if (lstat(path.c_str(), &found) != 0) {
        return system_error("cannot look at the ledger directory '" + path + "'", errno);
    }
    if (Status status = check_directory(path, found); !status.ok()) return status;
    UniqueFd fd{::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)};
    if (fd.get() < 0) return system_error("cannot open the ledger directory '" + path + "'", errno);
    if (fstat(fd.get(), &found) != 0) {
        return system_error("cannot look at the ledger directory '" + path + "'", errno);
    }
    if (Status status = check_directory(path, found); !status.ok()) return status;
    return PrivateDirectory{std::move(path), std::move(fd)};
}

Status PrivateDirectory::check_file(const std::string &name, int fd) const {
    struct stat found{};
    const std::string path = file_path(name);
    if (fstat(fd, &found) != 0) return system_error("cannot look at '" + path + "'", errno);
    const std::string remedy = "; stop the engines that use it and remove it";
    if (!S_ISREG(found.st_mode)) return {Code::denied, "'" + path + "' is no regular file" + remedy};
    if (found.st_uid != geteuid()) {
        return {Code::denied, "'" + path + "' belongs to " + user(found.st_uid) + ", this process runs as " +
                                  user(geteuid()) + remedy};
    }
    if ((found.st_mode & 07777U) != 0600U) {
        return {Code::denied, "'" + path + "' has mode " + octal_mode(found.st_mode) +
                                  " where 0600 is expected; chmod 600 it, or stop the engines and remove it"};
    }
    return {};
}

Result<UniqueFd> PrivateDirectory::open_file(const std::string &name) const {
    if (fault::point("files.open")) return system_error("cannot open '" + file_path(name) + "'", EMFILE);
    UniqueFd fd{openat(fd_.get(), name.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK)};
    if (fd.get() < 0) {
        if (errno == ELOOP) {
            return Status{Code::denied, quoted(file_path(name)) + " is a symlink; remove it"};
        }
        return system_error("cannot open '" + file_path(name) + "'", errno);
    }
    if (Status status = check_file(name, fd.get()); !status.ok()) return status;
    return fd;
}

Result<UniqueFd> PrivateDirectory::open_or_create(const std::string &name) const {
    if (fault::point("files.create")) return system_error("cannot create '" + file_path(name) + "'", ENOSPC);
    const int made = openat(fd_.get(), name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (made < 0) {
        if (errno != EEXIST) return system_error("cannot create '" + file_path(name) + "'", errno);
        return open_file(name);
    }
    UniqueFd fd{made};
    // The umask may have taken bits away; a file that its owner cannot open would stay in everybody's way.
    if (fchmod(fd.get(), 0600) != 0) return system_error("cannot set the mode of '" + file_path(name) + "'", errno);
    return fd;
}

Result<UniqueFd> PrivateDirectory::create_new(const std::string &name, std::uint64_t bytes) const {
    UniqueFd fd{openat(fd_.get(), name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600)};
    const std::string what = "cannot create '" + file_path(name) + "' of " + human_bytes(bytes);
    if (fd.get() < 0) return system_error(what, errno);
    int error = fchmod(fd.get(), 0600) == 0 ? 0 : errno;
    if (fault::point("files.allocate")) error = ENOSPC;
    if (error == 0) error = posix_fallocate(fd.get(), 0, static_cast<off_t>(bytes));
    if (error != 0) {
        unlink(name);
        return system_error(what, error);
    }
    return fd;
}

Status PrivateDirectory::publish(const std::string &from, const std::string &to) const {
    if (renameat2(fd_.get(), from.c_str(), fd_.get(), to.c_str(), RENAME_NOREPLACE) == 0) return {};
    if ((errno == EINVAL || errno == ENOSYS) && linkat(fd_.get(), from.c_str(), fd_.get(), to.c_str(), 0) == 0)
        return {};
    if (errno == EEXIST) return {Code::exists, quoted(file_path(to)) + " exists"};
    return system_error("cannot link '" + file_path(to) + "'", errno);
}

Status PrivateDirectory::rename(const std::string &from, const std::string &to) const {
    if (renameat(fd_.get(), from.c_str(), fd_.get(), to.c_str()) == 0) return {};
    return system_error("cannot replace '" + file_path(to) + "'", errno);
}

std::uint64_t PrivateDirectory::inode(const std::string &name) const noexcept {
    struct stat found{};
    return fstatat(fd_.get(), name.c_str(), &found, AT_SYMLINK_NOFOLLOW) == 0 ? found.st_ino : 0;
}

void PrivateDirectory::unlink(const std::string &name) const noexcept { unlinkat(fd_.get(), name.c_str(), 0); }

void PrivateDirectory::unlink_prefix(const std::string &prefix) const noexcept {
    const int copy = openat(fd_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (copy < 0) return;  // litter stays; it misleads nobody
    DIR *listing = fdopendir(copy);
    if (listing == nullptr) {
        close(copy);
        return;
    }
    while (const dirent *entry = readdir(listing)) {
        const std::string name = entry->d_name;
        if (name.compare(0, prefix.size(), prefix) == 0) unlink(name);
    }
    closedir(listing);
}

Result<std::unique_ptr<GuardedFd>> DirectoryLock::take(const PrivateDirectory &directory, std::uint64_t deadline_ms) {
    Result<UniqueFd> opened = directory.open_or_create(kLockName);
    if (!opened.ok()) return opened.status();
    auto guarded = std::make_unique<GuardedFd>(opened->take());
    const std::uint64_t until = now_ns() + deadline_ms * 1000000;
    std::uint64_t pause_us = 200;
    const bool denied = fault::point("files.lock");
    while (true) {
        const Status locked = denied ? Status{Code::exists, "injected"} : lock_byte(guarded->get(), 0);
        if (locked.ok()) return guarded;
        if (locked.code() != Code::exists) return locked;
        if (now_ns() >= until) {
            return Status{Code::timeout, "the lock of the ledger directory, '" + directory.file_path(kLockName) +
                                             "', was not free within " + human_ms(deadline_ms) +
                                             "; another process is creating a ledger there and does not get on"};
        }
        usleep(static_cast<useconds_t>(pause_us));
        pause_us = pause_us < 10000 ? pause_us * 2 : pause_us;
    }
}

}  // namespace elastickv::ledger
