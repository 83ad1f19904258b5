// The Ledger over a Table.
#pragma once

#include <memory>
#include <string>

#include "ledger/table.hpp"

namespace elastickv::ledger {

class TableLedger final : public Ledger {
  public:
    TableLedger(std::unique_ptr<Table> table, std::uint64_t capacity)
        : table_(std::move(table)), wanted_capacity_(capacity) {}

    // Makes the file's capacity the one asked for, or says who lives at another.
    Status settle_capacity();

    Result<std::unique_ptr<Tenant>> join(const TenantOptions &options) override;
    Result<std::unique_ptr<Tenant>> attach(int slot, std::uint64_t incarnation) override;
    Result<LedgerView> view() override;
    std::string path() const override { return table_->path(); }
    Result<std::uint64_t> order_limit(const std::string &name, std::uint64_t bytes, bool now) override;
    Status wait_limit(const std::string &name, std::uint64_t revision, std::uint64_t timeout_ms,
                      const std::function<bool()> &interrupted) override;
    Result<std::uint64_t> order_trim(const std::string &name, std::uint64_t bytes) override;
    Result<std::uint64_t> wait_trim(const std::string &name, std::uint64_t revision, std::uint64_t timeout_ms,
                                    const std::function<bool()> &interrupted) override;
    Status forget(const std::string &name) override;
    Status set_unmanaged(std::uint64_t bytes) override;

    Table &table() noexcept { return *table_; }

  private:
    Status settle_capacity_locked();
    Status check_floor(const TenantOptions &options, int slot);
    Result<int> choose_slot(const std::string &name);
    std::uint64_t write_row(const TenantOptions &options, int slot);
    // What a wait of orders looks at, with the lock held: is it answered, or why can it never be?
    using Look = std::function<Result<bool>(int slot)>;
    // timeout with the text of `late` when `look` has not said yes in time.
    Status wait_answer(const std::string &name, std::uint64_t timeout_ms, const std::function<bool()> &interrupted,
                       const Look &look, const std::function<std::string()> &late);
    Status unknown_name(const std::string &name);
    std::string living_names();

    std::unique_ptr<Table> table_;
    std::uint64_t wanted_capacity_;
};

}  // namespace elastickv::ledger
