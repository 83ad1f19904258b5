// The Tenant over a Table row.
#pragma once

#include <memory>

#include "ledger/table.hpp"

namespace elastickv::ledger {

class TableTenant final : public Tenant {
  public:
    // `fd` holds the lock on the byte of (slot, member). `table` belongs to `owner`.
    TableTenant(std::shared_ptr<Ledger> owner, Table &table, std::unique_ptr<GuardedFd> fd, int slot, int member,
                std::uint64_t incarnation) noexcept;
    ~TableTenant() override;
    void leave() noexcept override;

    int slot() const noexcept override { return slot_; }
    std::uint64_t incarnation() const noexcept override { return incarnation_; }
    const std::shared_ptr<Ledger> &ledger() const noexcept override { return owner_; }

    Status lease(std::uint64_t bytes, bool ring) override {
        return take(row().leased, bytes, ring, backlog_.load(std::memory_order_relaxed));
    }
    Status lease_static(std::uint64_t bytes, bool ring) override { return take(row().static_bytes, bytes, ring, 0); }
    void set_backlog(std::uint64_t bytes) noexcept override { backlog_.store(bytes, std::memory_order_relaxed); }
    void give(std::uint64_t bytes) noexcept override { give_back(row().leased, bytes); }
    void give_static(std::uint64_t bytes) noexcept override { give_back(row().static_bytes, bytes); }
    void withdraw_demand() noexcept override;
    std::uint32_t freed_word() const noexcept override;
    std::uint32_t wait_freed(std::uint32_t seen, std::uint64_t timeout_us) noexcept override;

    std::uint32_t bell_word() const noexcept override;
    std::uint32_t wait_bell(std::uint32_t seen, std::uint64_t timeout_us) noexcept override;
    void ring_self() noexcept override { futex_ring(row().bell); }

    Ask ask() override;
    bool pressed() noexcept override;
    void answered() noexcept override;

    Limit limit_wanted() const noexcept override { return row().limit_wanted.load(); }
    Limit limit_held() const noexcept override { return row().limit_held.load(); }
    void acknowledge_limit(const Limit &limit) noexcept override;
    Trim trim_wanted() const noexcept override { return as_trim(row().trim_wanted); }
    Trim trim_done() const noexcept override { return as_trim(row().trim_done); }
    void acknowledge_trim(const Trim &given) noexcept override;

    std::uint64_t leased() const noexcept override;
    std::uint64_t static_bytes() const noexcept override;
    std::uint64_t floor() const noexcept override;
    std::uint64_t headroom() override { return by_policy(policy::grantable); }
    std::uint64_t reachable() override { return by_policy(policy::reachable); }
    void publish(const Usage &usage, const Counters &counters) noexcept override;
    void add_mapped(std::int64_t bytes) noexcept override;
    void publish_static_used(std::uint64_t bytes) noexcept override;
    void observe(Latency what, std::uint64_t ns) noexcept override;
    void describe(const Description &description) noexcept override;

  private:
    Row &row() const noexcept { return table_.row(slot_); }
    std::uint64_t by_policy(std::uint64_t (*figure)(const policy::Snapshot &, int) noexcept);
    // Held over every call that changes the row: leave() waits for those who are inside.
    class Entry {
      public:
        explicit Entry(TableTenant &tenant) noexcept;
        ~Entry() { tenant_.inside_.fetch_sub(1); }
        Entry(const Entry &) = delete;
        Entry &operator=(const Entry &) = delete;
        // False after leave(), and in a forked child, where the row is the parent's: then nothing may be changed.
        bool ours() const noexcept { return ours_; }

      private:
        TableTenant &tenant_;
        bool ours_;
    };
    static Trim as_trim(const Revised &order) noexcept;
    // Buried while this process lives: its lock's file was swapped or its descriptor closed behind our back.
    bool removed() const noexcept { return row().incarnation.load(std::memory_order_relaxed) != incarnation_; }
    Status not_ours() const;
    bool excess() noexcept;
    void drop_demand() noexcept;
    Status take(Word &word, std::uint64_t bytes, bool ring, std::uint64_t backlog);
    void give_back(Word &word, std::uint64_t bytes) noexcept;
    policy::Verdict decide(std::uint64_t bytes, policy::Snapshot &snapshot, std::uint64_t capacity, int &index);
    void record_demand(std::uint64_t bytes, std::uint64_t backlog, std::uint64_t now) noexcept;
    void note_asks(const policy::Snapshot &snapshot) noexcept;
    void ring_others(const policy::Snapshot &snapshot) noexcept;
    Status refusal(policy::Verdict verdict, const policy::Snapshot &snapshot, std::uint64_t bytes) const;

    std::shared_ptr<Ledger> owner_;
    Table &table_;
    std::unique_ptr<GuardedFd> fd_;
    int slot_;
    int member_;
    std::uint64_t incarnation_;
    std::uint64_t epoch_;
    std::atomic<bool> left_{false};
    std::atomic<int> inside_{0};
    std::atomic<std::uint64_t> excess_again_ns_{0};  // when to look again whether the device is over its capacity
    std::atomic<bool> excess_{false};
    std::atomic<std::uint64_t> backlog_{0};  // of this process; on the row while a lease is refused
};

}  // namespace elastickv::ledger
