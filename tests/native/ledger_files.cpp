// The directory and the file: who may use them, and what damage looks like.
#include <fcntl.h>
#include <sys/stat.h>

#include <cstring>
#include <fstream>
#include <vector>

#include "base/faultpoint.hpp"
#include "ledger/layout.hpp"
#include "ledger/table.hpp"
#include "ledger_support.hpp"

using namespace ledgertest;
namespace lg = elastickv::ledger;

namespace {

std::vector<std::string> names_in(const std::string &path) {
    std::vector<std::string> names;
    for (const auto &entry : std::filesystem::directory_iterator(path)) names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
}

template <class T> void overwrite(const std::string &path, std::size_t offset, const T &value) {
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK_EQ(pwrite(fd, &value, sizeof value, static_cast<off_t>(offset)), static_cast<ssize_t>(sizeof value));
    close(fd);
}

lg::ConstantHeader header_of(const std::string &path) {
    lg::ConstantHeader header{};
    std::ifstream in(path, std::ios::binary);
    in.read(reinterpret_cast<char *>(&header), sizeof header);
    return header;
}

// The header with one field changed and the checksum made to fit, as another version would have written it.
void write_header(const std::string &path, lg::ConstantHeader header) {
    header.checksum = lg::header_checksum(header);
    overwrite(path, 0, header);
}

void expect_corrupt(const Directory &directory, const std::string &what) {
    const Status status = try_open(directory, 8 * MiB).status();
    CHECK(status.code() == Code::corrupt);
    const std::string expected = "'" + directory.file("host.ledger") + "': its " + what +
                                 "; stop the engines that use this device and remove the file";
    CHECK_EQ(status.message(), expected);
}

}  // namespace

TEST("ledger files: a private directory and private files are made") {
    Directory directory;
    CHECK(try_open(directory, 0).status().code() == Code::not_found);
    CHECK_EQ(try_open(directory, 0).status().message(),
             "there is no ledger of device 'host' in '" + directory.path +
                 "' (no engine has run on it); start one, or give the device's capacity");
    auto ledger = open(directory, 8 * MiB);
    struct stat found{};
    CHECK_EQ(lstat(directory.path.c_str(), &found), 0);
    CHECK_EQ(found.st_mode & 0777, 0700U);
    const std::vector<std::string> expected = {".lock", "host.alive", "host.ledger"};
    CHECK(names_in(directory.path) == expected);
    for (const std::string &name : expected) {
        CHECK_EQ(lstat(directory.file(name).c_str(), &found), 0);
        CHECK_EQ(found.st_mode & 0777, 0600U);
    }
    CHECK_EQ(ledger->path(), directory.file("host.ledger"));
    CHECK_EQ(open(directory, 0)->view().value().capacity, 8 * MiB);
}

TEST("ledger files: a directory that others reach is refused") {
    Directory directory;
    CHECK_EQ(mkdir(directory.path.c_str(), 0700), 0);
    CHECK_EQ(chmod(directory.path.c_str(), 0750), 0);
    const Status status = try_open(directory, 8 * MiB).status();
    CHECK(status.code() == Code::denied);
    CHECK_EQ(status.message(), "the ledger directory '" + directory.path +
                                   "' has mode 0750, so others can reach it; make it private: chmod 700 '" +
                                   directory.path + "'");
}

TEST("ledger files: a directory of another user is refused") {
    if (geteuid() != 0) return;  // only root can give a directory away
    Directory directory;
    CHECK_EQ(mkdir(directory.path.c_str(), 0700), 0);
    CHECK_EQ(chown(directory.path.c_str(), 12345, 12345), 0);
    const Status status = try_open(directory, 8 * MiB).status();
    CHECK(status.code() == Code::denied);
    CHECK_EQ(status.message(), "the ledger directory '" + directory.path +
                                   "' belongs to user 12345, this process runs as user 0; set a directory of your own");
}

TEST("ledger files: symlinks are not followed") {
    Directory directory;
    Directory other;
    CHECK_EQ(mkdir(other.path.c_str(), 0700), 0);
    CHECK_EQ(symlink(other.path.c_str(), directory.path.c_str()), 0);
    const std::string text = "the ledger directory '" + directory.path + "' is a symlink; name the directory itself";
    CHECK_EQ(try_open(directory, 8 * MiB).status().message(), text);
    directory.path += "/";
    CHECK_EQ(try_open(directory, 8 * MiB).status().message(), text);
    directory.path.pop_back();
    CHECK_EQ(unlink(directory.path.c_str()), 0);
    (void)open(directory, 8 * MiB);
    CHECK_EQ(rename(directory.file("host.ledger").c_str(), other.file("elsewhere").c_str()), 0);
    CHECK_EQ(symlink(other.file("elsewhere").c_str(), directory.file("host.ledger").c_str()), 0);
    const Status status = try_open(directory, 8 * MiB).status();
    CHECK(status.code() == Code::denied);
    CHECK_EQ(status.message(), "'" + directory.file("host.ledger") + "' is a symlink; remove it");
}

TEST("ledger files: files with another mode, owner or kind are refused") {
    Directory directory;
    (void)open(directory, 8 * MiB);
    CHECK_EQ(chmod(directory.file("host.alive").c_str(), 0666), 0);
    CHECK_EQ(try_open(directory, 8 * MiB).status().message(),
             "'" + directory.file("host.alive") +
                 "' has mode 0666 where 0600 is expected; chmod 600 it, or stop the engines and remove it");
    CHECK_EQ(chmod(directory.file("host.alive").c_str(), 0600), 0);
    if (geteuid() == 0) {
        CHECK_EQ(chown(directory.file("host.ledger").c_str(), 12345, 12345), 0);
        CHECK_EQ(
            try_open(directory, 8 * MiB).status().message(),
            "'" + directory.file("host.ledger") +
                "' belongs to user 12345, this process runs as user 0; stop the engines that use it and remove it");
    }
    CHECK_EQ(unlink(directory.file("host.ledger").c_str()), 0);
    CHECK_EQ(mkfifo(directory.file("host.ledger").c_str(), 0600), 0);
    CHECK_EQ(try_open(directory, 8 * MiB).status().message(),
             "'" + directory.file("host.ledger") + "' is no regular file; stop the engines that use it and remove it");
}

TEST("ledger files: the directory's parent must be there, device names are tame") {
    Directory directory;
    LedgerOptions options;
    options.directory = directory.root + "/a/b";
    options.device = "host";
    options.capacity = MiB;
    const Status status = Ledger::open(options).status();
    CHECK(status.code() == Code::not_found);
    CHECK_EQ(status.message(),
             "cannot make the ledger directory '" + directory.root + "/a/b': ENOENT (No such file or directory)");
    options.directory = "";
    CHECK(Ledger::open(options).status().code() == Code::invalid);
    options.directory = directory.path;
    for (const char *device : {"", "../x", "a/b", ".host", "a b"}) {
        options.device = device;
        CHECK(Ledger::open(options).status().code() == Code::invalid);
    }
    options.device = "GPU-1b2c:0.1_x";
    CHECK_OK(Ledger::open(options));
    options.capacity = std::uint64_t{1} << 60;
    CHECK_EQ(Ledger::open(options).status().message(), "a capacity of 1024 PiB is above the ledger's 256 TiB");
}

TEST("ledger files: each damaged or foreign field of the header is named") {
    Directory directory;
    (void)open(directory, 8 * MiB);
    const std::string path = directory.file("host.ledger");
    const lg::ConstantHeader good = header_of(path);
    const auto with = [&](auto change) {
        lg::ConstantHeader header = good;
        change(header);
        write_header(path, header);
    };
    with([](auto &h) { h.magic = 7; });
    expect_corrupt(directory, "magic number is 7, expected " + std::to_string(lg::kMagic));
    with([](auto &h) { h.version = lg::kFormatVersion + 1; });
    expect_corrupt(directory, "format version is " + std::to_string(lg::kFormatVersion + 1) + ", expected " +
                                  std::to_string(lg::kFormatVersion));
    with([](auto &h) { h.header_bytes = 8; });
    expect_corrupt(directory, "header size is 8, expected " + std::to_string(sizeof(lg::Header)));
    with([](auto &h) { h.row_bytes = 9; });
    expect_corrupt(directory, "row size is 9, expected " + std::to_string(sizeof(lg::Row)));
    with([](auto &h) { h.rows = 65; });
    expect_corrupt(directory, "number of rows is 65, expected 64");
    with([](auto &h) { h.members = 1; });
    expect_corrupt(directory, "number of members is 1, expected 64");
    with([](auto &h) { h.lock_abi = 1; });
    expect_corrupt(directory, "lock layout is 1, expected " + std::to_string(lg::kLockAbi));
    with([](auto &h) { h.device[0] = 'g'; });
    expect_corrupt(directory, "device is 'gost', expected 'host'");
    lg::ConstantHeader bent = good;
    bent.boot_id[3] ^= 1;  // without its checksum this is damage, not another boot
    overwrite(path, 0, bent);
    expect_corrupt(directory, "header checksum is " + std::to_string(good.checksum) + ", expected " +
                                  std::to_string(lg::header_checksum(bent)));
    overwrite(path, 0, good);
    overwrite(path, offsetof(lg::Header, capacity), lg::pack_capacity(8 * MiB) ^ 0x1000);
    const Status capacity = try_open(directory, 8 * MiB).status();
    CHECK(capacity.code() == Code::corrupt);
    CHECK_EQ(capacity.message(), "'" + path +
                                     "' has a damaged capacity word (found 8.00 MiB (8392704 bytes) with wrong check "
                                     "bits); stop the engines that use this device and remove the file");
    overwrite(path, offsetof(lg::Header, capacity), lg::pack_capacity(8 * MiB));
    CHECK_OK(try_open(directory, 8 * MiB));
    CHECK_EQ(truncate(path.c_str(), 4096), 0);
    CHECK_EQ(try_open(directory, 8 * MiB).status().message(),
             "'" + path + "' is 4096 bytes long, a ledger has " + std::to_string(sizeof(lg::File)) +
                 "; stop the engines that use this device and remove the file");
    CHECK_EQ(truncate(path.c_str(), 0), 0);
    CHECK(try_open(directory, 8 * MiB).status().code() == Code::corrupt);
    CHECK_EQ(unlink(path.c_str()), 0);
    CHECK_OK(try_open(directory, 8 * MiB));
}

TEST("ledger files: damage while open shows at the next call") {
    Directory directory;
    auto ledger = open(directory, 8 * MiB);
    auto a = join(ledger, "a");
    overwrite(directory.file("host.ledger"), offsetof(lg::Header, capacity), std::uint64_t{12345});
    CHECK(a->lease(MiB, false).code() == Code::corrupt);
    CHECK(ledger->view().status().code() == Code::corrupt);
    CHECK_EQ(a->headroom(), 0U);
}

TEST("ledger files: a file of an earlier boot is replaced, unless somebody lives on it") {
    Directory directory;
    const std::string path = directory.file("host.ledger");
    auto ledger = open(directory, 8 * MiB);
    auto a = join(ledger, "a");
    CHECK_OK(a->lease(4 * MiB, false));
    lg::ConstantHeader old = header_of(path);
    std::memcpy(old.boot_id.data(), "00000000", 8);
    write_header(path, old);
    const Status lives = try_open(directory, 8 * MiB).status();
    CHECK(lives.code() == Code::corrupt);
    CHECK_EQ(lives.message(), "'" + path +
                                  "' was written by an earlier elastickv, or under another boot of this machine, yet "
                                  "tenants live on it; stop them first, and share a "
                                  "ledger directory only among processes of one machine");
    a.reset();
    CHECK(try_open(directory, 0).status().code() == Code::not_found);
    auto fresh = open(directory, 16 * MiB);
    CHECK_EQ(fresh->view().value().capacity, 16 * MiB);
    CHECK(fresh->view().value().tenants.empty());
    CHECK(std::string(header_of(path).boot_id.data()) != std::string(old.boot_id.data()));
}

TEST("ledger files: a file of an earlier format is replaced, unless somebody lives on it") {
    Directory directory;
    const std::string path = directory.file("host.ledger");
    auto ledger = open(directory, 8 * MiB);
    auto a = join(ledger, "a");
    lg::ConstantHeader old = header_of(path);
    old.version = 1;
    old.row_bytes = 1024;
    write_header(path, old);
    CHECK_EQ(std::filesystem::file_size(path), sizeof(lg::File));
    std::filesystem::resize_file(path, sizeof(lg::Header) + 64 * 1024);  // its size, too, was another
    const Status lives = try_open(directory, 8 * MiB).status();
    CHECK(lives.code() == Code::corrupt);
    CHECK(lives.message().starts_with("'" + path + "' was written by an earlier elastickv, or under another boot"));
    std::filesystem::resize_file(path, sizeof(lg::File));
    a.reset();
    CHECK(try_open(directory, 0).status().code() == Code::not_found);
    lg::ConstantHeader bent = old;
    bent.row_bytes = 7;  // without its checksum this is damage, not another version
    overwrite(path, 0, bent);
    expect_corrupt(directory, "format version is 1, expected " + std::to_string(lg::kFormatVersion));
    write_header(path, old);
    auto fresh = open(directory, 16 * MiB);
    CHECK_EQ(fresh->view().value().capacity, 16 * MiB);
    CHECK_EQ(header_of(path).version, lg::kFormatVersion);
    CHECK_OK(join(fresh, "a")->lease(16 * MiB, false));
}

TEST("ledger files: removing files under living tenants is noticed") {
    Directory directory;
    auto ledger = open(directory, 8 * MiB);
    auto a = join(ledger, "a");
    CHECK_EQ(unlink(directory.file("host.ledger").c_str()), 0);
    const Status removed = try_open(directory, 8 * MiB).status();
    CHECK(removed.code() == Code::corrupt);
    CHECK_EQ(removed.message(), "'" + directory.file("host.ledger") +
                                    "' was removed while tenants live that lease from it; stop them first");
    CHECK_EQ(
        ledger->join(named("b")).status().message(),
        "'" + directory.file("host.ledger") + "' was removed or replaced since it was opened; open the ledger again");
    a.reset();
    auto fresh = open(directory, 8 * MiB);
    CHECK(ledger->join(named("b")).status().code() == Code::corrupt);
    auto c = join(fresh, "c");
    CHECK_EQ(unlink(directory.file("host.alive").c_str()), 0);
    const Status blind = try_open(directory, 8 * MiB).status();
    CHECK(blind.code() == Code::corrupt);
    CHECK_EQ(blind.message(), "'" + directory.file("host.alive") + "' is not the file that '" +
                                  directory.file("host.ledger") +
                                  "' was made with (it was removed or replaced), so nobody can tell who lives; stop "
                                  "the engines that use this device and remove both");
    CHECK_OK(c->lease(MiB, false));  // who has the old file open still knows
    CHECK(row_of(fresh, "c").alive);
}

TEST("ledger files: the capacity changes only while nobody lives there") {
    Directory directory;
    auto ledger = open(directory, 8 * MiB);
    auto a = join(ledger, "a");
    CHECK_OK(try_open(directory, 8 * MiB));
    const Status status = try_open(directory, 16 * MiB).status();
    CHECK(status.code() == Code::exists);
    CHECK_EQ(status.message(),
             "device 'host' is shared at a capacity of 8 MiB by the tenants that run now (a), and "
             "16 MiB was asked for; use the same capacity, or stop them first");
    a.reset();
    auto wider = open(directory, 16 * MiB);
    auto b = join(wider, "b");
    CHECK_OK(b->lease(16 * MiB, false));
    CHECK(ledger->join(named("c")).status().code() == Code::exists);  // it was opened for 8 MiB
}

TEST("ledger files: a creator that dies leaves nothing in the way") {
    Directory directory;
    Child child([&] {
        fault::set("ledger.create.before_publish", fault::Action::kill, 0);
        (void)try_open(directory, 8 * MiB);
    });
    CHECK_EQ(child.wait(), 1000 + SIGKILL);
    CHECK(!std::filesystem::exists(directory.file("host.ledger")));
    CHECK_EQ(names_in(directory.path).size(), 3U);  // the lock, the alive file, the half-made one
    (void)open(directory, 8 * MiB);
    const std::vector<std::string> expected = {".lock", "host.alive", "host.ledger"};
    CHECK(names_in(directory.path) == expected);
}

TEST("ledger files: many creators at once agree on one file") {
    for (int round = 0; round < 10; ++round) {
        Directory directory;
        Signal seen, leave;
        std::vector<std::unique_ptr<Child>> children;
        for (int i = 0; i < 8; ++i) {
            children.push_back(std::make_unique<Child>([&, i] {
                auto ledger = open(directory, 8 * MiB, 20000);
                auto tenant = join(ledger, "t" + std::to_string(i));
                CHECK_OK(tenant->lease(MiB, false));
                const auto all_leased = [&] {
                    std::uint64_t leased = 0;
                    for (const TenantView &row : rows_of(ledger)) leased += row.leased;
                    return leased == 8 * MiB;
                };
                for (int tries = 0; tries < 15'000 && !all_leased(); ++tries) usleep(1000);
                CHECK(all_leased());
                seen.send();
                leave.receive();  // nobody leaves before all have seen all
            }));
        }
        for (std::size_t i = 0; i < children.size(); ++i) seen.receive();
        for (std::size_t i = 0; i < children.size(); ++i) leave.send();
        for (auto &child : children) CHECK_EQ(child->wait(), 0);
    }
}

TEST("ledger files: somebody who holds the directory's lock is waited for, then named") {
    Directory directory;
    CHECK_EQ(mkdir(directory.path.c_str(), 0700), 0);
    auto private_directory = lg::PrivateDirectory::open(directory.path);
    CHECK_OK(private_directory);
    auto lock = lg::DirectoryLock::take(*private_directory, 1000);
    CHECK_OK(lock);
    const Status status = try_open(directory, 8 * MiB, 50).status();
    CHECK(status.code() == Code::timeout);
    CHECK_EQ(status.message(), "the lock of the ledger directory, '" + directory.file(".lock") +
                                   "', was not free within 50 ms; another process is creating a ledger there and does "
                                   "not get on");
}
