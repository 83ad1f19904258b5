// One mapped ledger file: its checks, its mutex, its rows, and the burial of the dead.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "ledger/files.hpp"
#include "ledger/layout.hpp"
#include "ledger/policy.hpp"

namespace elastickv::ledger {

class Table;

// The table's mutex, held. Taken by Table::lock() alone.
class TableGuard {
  public:
    explicit TableGuard(Table &table) noexcept : table_(&table) {}
    TableGuard(TableGuard &&other) noexcept : table_(std::exchange(other.table_, nullptr)) {}
    TableGuard &operator=(TableGuard &&) = delete;
    ~TableGuard();

  private:
    Table *table_;
};

// Threads: every method may be called from any thread; those that say "locked" need a TableGuard to be held.
class Table {
  public:
    // Opens the device's file or creates it (capacity > 0), checks every word of its header, replaces one of an
    // earlier boot. Codes as Ledger::open, but for the capacity, which it leaves alone.
    static Result<std::unique_ptr<Table>> open(const LedgerOptions &options);
    ~Table();
    Table(const Table &) = delete;
    Table &operator=(const Table &) = delete;

    // timeout after the ledger's deadline: the text says while what (`doing`, a literal such as "join"), and who took
    // the mutex last. Repairs the table when the last owner died with the mutex.
    Result<TableGuard> lock(const char *doing);

    Header &header() noexcept { return file_->header; }
    Row &row(int slot) noexcept { return file_->rows[static_cast<std::size_t>(slot)]; }
    const std::string &path() const noexcept { return path_; }
    const std::string &device() const noexcept { return device_; }
    const PrivateDirectory &directory() const noexcept { return directory_; }
    std::string alive_name() const { return device_ + ".alive"; }
    int alive_fd() const noexcept { return alive_.get(); }  // for questions only; carries no lock

    // corrupt when the file was removed or replaced since it was opened: what is mapped is then nobody's table.
    Status check_current() const;
    // Locked. corrupt when the word fails its own check.
    Result<std::uint64_t> capacity();
    // Locked. Buries tenants and members whose locks are gone; returns how many tenants.
    int reap();
    // No lock: does a row claim to live whose process is gone?
    bool anybody_died() noexcept;
    // No lock: do tenants and outsiders together hold more than the capacity? A hint, the figures are read one by one.
    bool over_capacity() noexcept;
    // Locked. Empties a row for good or for the restart of its name.
    void bury(int slot);
    static void forget_made_up(Row &row) noexcept;
    // Locked. What the policy decides upon; clears expired marks of waiting on the way.
    policy::Snapshot snapshot(std::uint64_t capacity);
    // Locked. Slot with that name, alive or kept; -1: none.
    int find_name(const std::string &name);
    bool lives(int slot) noexcept { return row(slot).incarnation.load(std::memory_order_acquire) != 0; }

    void ring_freed() noexcept { futex_ring(header().freed); }

  private:
    friend class TableGuard;
    Table(PrivateDirectory directory, std::string device, std::uint64_t deadline_ms)
        : directory_(std::move(directory)),
          device_(std::move(device)),
          deadline_ms_(deadline_ms),
          path_(directory_.file_path(device_ + ".ledger")) {}

    Status open_or_create(std::uint64_t capacity);
    Result<bool> try_map();  // true: mapped; false: of an earlier boot or format version
    Status check_header(const ConstantHeader &found) const;
    bool older_version(const ConstantHeader &found) const;
    Status check_unused(bool stale) const;
    Status publish_new(std::uint64_t capacity, bool replace);
    Status init_mutex(File &file) const;
    void repair();
    ConstantHeader expected_header() const noexcept {
        return make_constant_header(boot_id_, device_, directory_.inode(alive_name()));
    }
    void unmap() noexcept;
    std::string file_name() const { return device_ + ".ledger"; }

    PrivateDirectory directory_;
    std::string device_;
    std::uint64_t deadline_ms_;
    std::string path_;
    std::string boot_id_;
    UniqueFd alive_;
    File *file_ = nullptr;
    std::uint64_t inode_ = 0;

    // How long what a tenant unmaps has not become less, as far as this process has looked. Under the lock.
    struct Leaving {
        std::uint64_t bytes = 0, since_ns = 0, looked_ns = 0;
        bool stalled(std::uint64_t now_leaving, std::uint64_t now_ns) noexcept;
    };
    std::array<Leaving, kMaxTenants> leaving_{};
};

// [A-Za-z0-9._:-], 1 to 63 bytes, not beginning with a dot.
bool valid_device_name(const std::string &name) noexcept;
// [A-Za-z0-9._-], 1 to 63 bytes.
bool valid_tenant_name(const std::string &name) noexcept;

}  // namespace elastickv::ledger
