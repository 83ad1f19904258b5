// Table: opening, checking and creating the file.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <new>

#include "base/faultpoint.hpp"
#include "ledger/alive.hpp"
#include "ledger/table.hpp"
#include "ledger/text.hpp"

namespace elastickv::ledger {

namespace {

constexpr const char *kRemedy = "; stop the engines that use this device and remove the file";

bool valid_name(const std::string &name, const char *extra) noexcept {
    if (name.empty() || name.size() > 63) return false;
    for (const char c : name) {
        const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
        if (!plain && std::strchr(extra, c) == nullptr) return false;
    }
    return true;
}

Result<std::string> read_boot_id() {
    constexpr const char *path = "/proc/sys/kernel/random/boot_id";
    UniqueFd fd{::open(path, O_RDONLY | O_CLOEXEC)};
    std::array<char, 64> text{};
    const ssize_t got = fd.get() < 0 ? -1 : read(fd.get(), text.data(), text.size() - 1);
    if (got < 36) return system_error("cannot read '" + std::string(path) + "'", got < 0 ? errno : EIO);
    return std::string(text.data(), 36);
}

// A text in the header, which may be damaged, as something that can be printed.
template <std::size_t N> std::string printable(const std::array<char, N> &bytes) {
    std::string text(bytes.data(), strnlen(bytes.data(), N));
    for (char &c : text) {
        if (c < ' ' || c > '~') c = '?';
    }
    return text;
}

}  // namespace

bool valid_device_name(const std::string &name) noexcept { return valid_name(name, "._:-") && name.front() != '.'; }
bool valid_tenant_name(const std::string &name) noexcept { return valid_name(name, "._-"); }

Result<std::unique_ptr<Table>> Table::open(const LedgerOptions &options) {
    if (!valid_device_name(options.device)) {
        return Status{Code::invalid,
                      "'" + options.device + "' is no device name: 1 to 63 of A-Z a-z 0-9 . _ : - and no dot in front"};
    }
    if (options.capacity >= kMaxBytes) {
        return Status{Code::invalid, "a capacity of " + human_bytes(options.capacity) + " is above the ledger's " +
                                         human_bytes(kMaxBytes)};
    }
    Result<PrivateDirectory> directory = PrivateDirectory::open(options.directory);
    if (!directory.ok()) return directory.status();
    std::unique_ptr<Table> table(new Table(std::move(directory).value(), options.device, options.deadline_ms));
    Result<std::string> boot = read_boot_id();
    if (!boot.ok()) return boot.status();
    table->boot_id_ = std::move(boot).value();
    if (Status status = table->open_or_create(options.capacity); !status.ok()) return status;
    return table;
}

Table::~Table() { unmap(); }

void Table::unmap() noexcept {
    if (file_ != nullptr) munmap(file_, sizeof(File));
    file_ = nullptr;
}

Status Table::open_or_create(std::uint64_t capacity) {
    Result<UniqueFd> alive = directory_.open_or_create(alive_name());
    if (!alive.ok()) return alive.status();
    alive_ = std::move(alive).value();
    // Each round that ends without a mapping means that somebody else replaced the file meanwhile.
    for (int round = 0; round < 16; ++round) {
        Result<bool> mapped = try_map();
        if (mapped.ok() && *mapped) return {};
        const bool absent = !mapped.ok() && mapped.status().code() == Code::not_found;
        if (!mapped.ok() && !absent) return mapped.status();
        if (absent && capacity == 0) {
            return {Code::not_found, "there is no ledger of device '" + device_ + "' in '" + directory_.path() +
                                         "' (no engine has run on it); start one, or give the device's capacity"};
        }
        Result<std::unique_ptr<GuardedFd>> lock = DirectoryLock::take(directory_, deadline_ms_);
        if (!lock.ok()) return lock.status();
        mapped = try_map();  // the one who had the lock before may have made it
        if (mapped.ok() && *mapped) return {};
        const bool stale = mapped.ok();
        if (!stale && mapped.status().code() != Code::not_found) return mapped.status();
        if (Status status = check_unused(stale); !status.ok()) return status;
        if (stale && capacity == 0) {
            return {Code::not_found, "the ledger '" + path_ +
                                         "' is of an earlier boot or elastickv and nobody has used the device "
                                         "since; start an engine, or give the device's capacity"};
        }
        if (Status status = publish_new(capacity, stale); !status.ok() && status.code() != Code::exists) return status;
    }
    return {Code::timeout, "the ledger '" + path_ + "' was replaced by others 16 times while it was being opened"};
}

// A table is made anew only where nobody lives: who lives has leases on a table that would no longer count.
Status Table::check_unused(bool stale) const {
    if (!locked_by_other(alive_.get(), 0, std::uint64_t{kMaxTenants} * kMaxMembers)) return {};
    if (stale) {
        return {Code::corrupt, "'" + path_ +
                                   "' was written by an earlier elastickv, or under another boot of this machine, yet "
                                   "tenants live on it; stop them first, and share a ledger directory only among "
                                   "processes of one machine"};
    }
    return {Code::corrupt, quoted(path_) + " was removed while tenants live that lease from it; stop them first"};
}

Status Table::check_current() const {
    if (directory_.inode(file_name()) == inode_) {
        if (directory_.inode(alive_name()) == file_->header.constant.alive_inode) return {};
        return {Code::corrupt, quoted(alive_name()) + " beside " + quoted(path_) +
                                   " was removed or replaced: nobody could see who lives" + kRemedy};
    }
    return {Code::corrupt, quoted(path_) + " was removed or replaced since it was opened; open the ledger again"};
}

// A whole header of an earlier format: its rows mean nothing here, but who lives does, and so does its device.
bool Table::older_version(const ConstantHeader &found) const {
    return found.magic == kMagic && found.version >= 1 && found.version < kFormatVersion &&
           header_checksum(found) == found.checksum && found.device == expected_header().device;
}

Result<bool> Table::try_map() {
    Result<UniqueFd> fd = directory_.open_file(file_name());
    if (!fd.ok()) return fd.status();
    const off_t size = lseek(fd->get(), 0, SEEK_END);
    if (size < 0) return system_error("cannot read the size of '" + path_ + "'", errno);
    if (size < static_cast<off_t>(sizeof(ConstantHeader))) {
        return Status{Code::corrupt, "'" + path_ + "' is " + std::to_string(size) + " bytes long, a ledger has " +
                                         std::to_string(sizeof(File)) + kRemedy};
    }
    ConstantHeader found{};
    const ssize_t got = pread(fd->get(), &found, sizeof found, 0);
    if (got != static_cast<ssize_t>(sizeof found)) {
        return system_error("cannot read '" + path_ + "'", got < 0 ? errno : EIO);
    }
    if (older_version(found)) return false;
    if (Status status = check_header(found); !status.ok()) return status;
    if (size != static_cast<off_t>(sizeof(File))) {
        return Status{Code::corrupt, "'" + path_ + "' is " + std::to_string(size) + " bytes long, a ledger has " +
                                         std::to_string(sizeof(File)) + kRemedy};
    }
    if (boot_id_ != found.boot_id.data()) return false;
    void *mapped = mmap(nullptr, sizeof(File), PROT_READ | PROT_WRITE, MAP_SHARED, fd->get(), 0);
    if (mapped == MAP_FAILED) return system_error("cannot map '" + path_ + "'", errno);
    file_ = static_cast<File *>(mapped);
    struct stat status{};
    inode_ = fstat(fd->get(), &status) == 0 ? status.st_ino : 0;
    std::uint64_t bytes = 0;
    if (!unpack_capacity(file_->header.capacity.load(std::memory_order_acquire), bytes)) {
        unmap();
        return Status{Code::corrupt, "'" + path_ + "' has a damaged capacity word (found " + human_bytes(bytes) +
                                         " with wrong check bits)" + kRemedy};
    }
    (void)fault::point("ledger.open.mapped");
    return true;
}

Status Table::check_header(const ConstantHeader &found) const {
    const auto wrong = [this](const char *what, const std::string &have, const std::string &want) {
        return Status{Code::corrupt, "'" + path_ + "': its " + what + " is " + have + ", expected " + want + kRemedy};
    };
    const ConstantHeader expected = expected_header();
    if (found.magic != expected.magic) {
        return wrong("magic number", std::to_string(found.magic), std::to_string(expected.magic));
    }
    struct Field {
        const char *name;
        std::uint64_t have, want;
    };
    const std::array<Field, 6> fields = {{
        {"format version", found.version, expected.version},
        {"header size", found.header_bytes, expected.header_bytes},
        {"row size", found.row_bytes, expected.row_bytes},
        {"number of rows", found.rows, expected.rows},
        {"number of members", found.members, expected.members},
        {"lock layout", found.lock_abi, expected.lock_abi},
    }};
    for (const Field &field : fields) {
        if (field.have != field.want) return wrong(field.name, std::to_string(field.have), std::to_string(field.want));
    }
    // Before the texts, so that a damaged boot id is damage and not a file of another boot.
    if (const std::uint64_t sum = header_checksum(found); sum != found.checksum) {
        return wrong("header checksum", std::to_string(found.checksum), std::to_string(sum));
    }
    if (found.device != expected.device) {
        return wrong("device", quoted(printable(found.device)), quoted(device_));
    }
    if (boot_id_ == found.boot_id.data() && found.alive_inode != expected.alive_inode) {
        return {Code::corrupt, quoted(directory_.file_path(alive_name())) + " is not the file that '" + path_ +
                                   "' was made with (it was removed or replaced), so nobody can tell who lives; stop "
                                   "the engines that use this device and remove both"};
    }
    return {};
}

Status Table::init_mutex(File &file) const {
    pthread_mutexattr_t attributes;
    int error = pthread_mutexattr_init(&attributes);
    if (error != 0) return system_error("cannot make the ledger's mutex", error);
    error = pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    if (error == 0) error = pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    if (error == 0) error = pthread_mutex_init(&file.header.mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    if (error != 0) return system_error("cannot make the ledger's mutex", error);
    return {};
}

// The caller holds the directory's lock, so any temporary file that is there belongs to a creator who died.
Status Table::publish_new(std::uint64_t capacity, bool replace) {
    std::string prefix = ".";  // file_path() of a name that no device can have
    prefix += file_name() + ".new.";
    directory_.unlink_prefix(prefix);
    const std::string name = prefix + std::to_string(own_pid());
    Result<UniqueFd> fd = directory_.create_new(name, sizeof(File));
    if (!fd.ok()) return fd.status();
    void *mapped = mmap(nullptr, sizeof(File), PROT_READ | PROT_WRITE, MAP_SHARED, fd->get(), 0);
    if (mapped == MAP_FAILED) {
        const int error = errno;
        directory_.unlink(name);
        return system_error("cannot map '" + directory_.file_path(name) + "'", error);
    }
    File *file = new (mapped) File;  // all zeros: a table without rows
    Status status = init_mutex(*file);
    file->header.capacity.store(pack_capacity(capacity), std::memory_order_relaxed);
    file->header.constant = expected_header();
    munmap(mapped, sizeof(File));
    if (fault::point("ledger.create.before_publish")) status = system_error("cannot link '" + path_ + "'", EACCES);
    if (status.ok()) status = replace ? directory_.rename(name, file_name()) : directory_.publish(name, file_name());
    (void)fault::point("ledger.create.published");
    directory_.unlink(name);  // after a rename there is nothing left under it
    return status;
}

}  // namespace elastickv::ledger
