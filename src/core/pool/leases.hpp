// The leases of one pool, counted in its pages, over every device its ranks stand on: all devices or none.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.hpp"
#include "ledger/ledger.hpp"

namespace elastickv {

// What the policy asks of the pool, in pages. `free` counts pages that are free and, where others wait
// for what is above this tenant's share, pages that become free (`in_use` now): they go before they are used again.
struct PageAsk {
    std::uint64_t free = 0, cached = 0, in_use = 0;
    std::uint64_t along = 0;  // free pages that may go besides
};

struct PageUsage {
    std::uint64_t virtual_pages = 0, used = 0, cached = 0, free = 0, transit = 0;
    std::uint64_t leaving = 0;  // of those in transit: being unmapped
    std::uint64_t pinned = 0;   // of those used: block 0's
};

class Leases {
  public:
    struct Share {
        std::shared_ptr<Tenant> tenant;
        std::uint64_t page_cost = 0;  // bytes that one page of the pool takes on this device, all its ranks together
    };
    explicit Leases(std::vector<Share> shares) : shares_(std::move(shares)), orders_(shares_.size()) {}

    Status lease(std::uint64_t pages, bool ring);
    void give(std::uint64_t pages) noexcept;
    void withdraw() noexcept;
    void set_backlog(std::uint64_t pages) noexcept;  // what waits behind the next lease
    std::uint64_t headroom();                        // pages lease() would grant now
    std::uint64_t reachable();                       // pages that a demand may at most be for
    std::uint64_t floor_pages() const noexcept;
    PageAsk ask();
    bool pressed() const noexcept;
    void ring_self() noexcept { shares_.front().tenant->ring_self(); }
    void answered() noexcept;
    // Reads the operator's orders that are not answered yet; true: there is one. What is answered later is what was
    // read here: an order that comes in between stays open.
    bool read_orders();
    std::uint64_t trim() const noexcept;  // pages that the trims seen by read_orders() ask for
    // Answers what read_orders() saw: `trimmed` pages go for the trims. A limit that is to be reached now is left open
    // while the tenant holds more.
    void answer_orders(std::uint64_t trimmed) noexcept;
    // Answers limits that are to be reached now and are.
    void settle_limits() noexcept;
    bool limit_open() const noexcept;  // ordered and not acknowledged
    // How many of `pages` are above the limit on some device; `now`: only under limits that allow to preempt.
    std::uint64_t over_limit(std::uint64_t pages, bool now) const noexcept;
    void observe(Latency what, std::uint64_t ns) noexcept;
    void publish(const PageUsage &usage, bool working, const Counters &counters) noexcept;
    std::uint32_t freed_word() const noexcept { return shares_.front().tenant->freed_word(); }
    void wait_freed(std::uint32_t seen, std::uint64_t timeout_us) noexcept;
    const std::vector<Share> &shares() const noexcept { return shares_; }

  private:
    struct Order {
        Tenant::Limit limit;
        Tenant::Trim trim;
        bool limit_open = false, trim_open = false;
    };
    static bool open(const Tenant &tenant, const Tenant::Limit &limit) noexcept {
        return limit.revision != tenant.limit_held().revision;
    }
    static bool within(const Tenant &tenant, const Tenant::Limit &limit) noexcept {
        return limit.bytes == kNoLimit || tenant.leased() + tenant.static_bytes() <= limit.bytes;
    }

    std::vector<Share> shares_;
    std::vector<Order> orders_;  // by share; the caller's lock guards them
};

}  // namespace elastickv
