// A tenant without a ledger: one budget in this process, so that the pool can be tested alone.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

#include "base/futex.hpp"
#include "ledger/ledger.hpp"

namespace elastickv {

struct Budget {
    std::uint64_t capacity = 0;
    std::atomic<std::uint64_t> leased{0};
    std::atomic<std::uint32_t> freed{0};
};

class FakeTenant : public Tenant {
  public:
    explicit FakeTenant(std::shared_ptr<Budget> budget) : budget_(std::move(budget)) {}
    int slot() const noexcept override { return 0; }
    std::uint64_t incarnation() const noexcept override { return 7; }
    const std::shared_ptr<Ledger> &ledger() const noexcept override { return none_; }
    Status lease(std::uint64_t bytes, bool ring) override {
        std::uint64_t now = budget_->leased.load();
        do {
            if (leased_.load() + bytes > limit.bytes) return {Code::limit, "limit"};
            if (now + bytes > budget_->capacity) {
                if (ring) ++rings;
                return {Code::unavailable, "none now"};
            }
        } while (!budget_->leased.compare_exchange_weak(now, now + bytes));
        leased_.fetch_add(bytes);
        return {};
    }
    Status lease_static(std::uint64_t bytes, bool ring) override { return lease(bytes, ring); }
    void give(std::uint64_t bytes) noexcept override {
        leased_.fetch_sub(bytes);
        budget_->leased.fetch_sub(bytes);
        futex_ring(budget_->freed);
    }
    void give_static(std::uint64_t bytes) noexcept override { give(bytes); }
    void withdraw_demand() noexcept override {}
    std::uint32_t freed_word() const noexcept override { return budget_->freed.load(); }
    std::uint32_t wait_freed(std::uint32_t seen, std::uint64_t us) noexcept override {
        futex_wait(budget_->freed, seen, us);
        return budget_->freed.load();
    }
    std::uint32_t bell_word() const noexcept override { return bell_.load(); }
    std::uint32_t wait_bell(std::uint32_t seen, std::uint64_t us) noexcept override {
        futex_wait(bell_, seen, us);
        return bell_.load();
    }
    void ring_self() noexcept override { futex_ring(bell_); }
    void set_asked(const Ask &ask) {
        const std::scoped_lock lock(mutex_);
        asked_ = ask;
    }
    Ask ask() override {
        const std::scoped_lock lock(mutex_);
        Ask out = asked_;
        return out;
    }
    bool pressed() noexcept override {
        const std::scoped_lock lock(mutex_);
        return asked_.cached != 0 || asked_.mapped_free != 0 || asked_.as_freed != 0 ||
               limit.revision != held.revision || trim.revision != trimmed.revision;
    }
    Trim trim_wanted() const noexcept override { return trim; }
    Trim trim_done() const noexcept override { return trimmed; }
    void acknowledge_trim(const Trim &given) noexcept override { trimmed = given; }
    void publish_static_used(std::uint64_t) noexcept override {}
    void observe(Latency what, std::uint64_t ns) noexcept override {
        ++samples[static_cast<std::size_t>(what)];
        sample_ns[static_cast<std::size_t>(what)] += ns;
    }
    void answered() noexcept override { set_asked({}); }
    Limit limit_wanted() const noexcept override { return limit; }
    Limit limit_held() const noexcept override { return held; }
    void acknowledge_limit(const Limit &now) noexcept override { held = now; }
    std::uint64_t leased() const noexcept override { return leased_.load(); }
    std::uint64_t static_bytes() const noexcept override { return fixed; }
    std::uint64_t floor() const noexcept override { return floor_bytes; }
    std::uint64_t headroom() override {
        return std::min(budget_->capacity - budget_->leased.load(),
                        limit.bytes - std::min(limit.bytes, leased_.load()));
    }
    void set_backlog(std::uint64_t bytes) noexcept override { backlog = bytes; }
    void publish(const Usage &now, const Counters &all) noexcept override {
        usage = now;
        counters = all;
    }
    void add_mapped(std::int64_t bytes) noexcept override { mapped.fetch_add(bytes); }

    Limit limit, held;
    Trim trim, trimmed;
    std::uint64_t fixed = 0, backlog = 0;
    Counters counters;
    std::array<std::atomic<std::uint64_t>, kLatencies> samples{}, sample_ns{};
    std::uint64_t floor_bytes = 0;
    Usage usage;
    std::atomic<std::int64_t> mapped{0};
    int rings = 0;

  private:
    std::mutex mutex_;
    Ask asked_;
    std::shared_ptr<Budget> budget_;
    std::shared_ptr<Ledger> none_;
    std::atomic<std::uint64_t> leased_{0};
    std::atomic<std::uint32_t> bell_{0};
};

}  // namespace elastickv
