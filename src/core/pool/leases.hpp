// The leases of one pool, counted in its pages, over every device its ranks stand on: all devices or none.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.hpp"
#include "ledger/ledger.hpp"

namespace elastickv {

// What the policy and the limit ask of the pool, in pages. `free` counts pages that are free and, where others wait
// for what is above this tenant's share, pages that become free: they go before they are used again.
struct PageAsk {
    std::uint64_t free = 0, cached = 0, over_limit = 0;
    bool any() const noexcept { return free != 0 || cached != 0 || over_limit != 0; }
};

struct PageUsage {
    std::uint64_t virtual_pages = 0, used = 0, cached = 0, free = 0, transit = 0;
};

class Leases {
  public:
    struct Share {
        std::shared_ptr<Tenant> tenant;
        std::uint64_t page_cost = 0;  // bytes that one page of the pool takes on this device, all its ranks together
    };
    explicit Leases(std::vector<Share> shares) : shares_(std::move(shares)) {}

    Status lease(std::uint64_t pages, bool ring);
    void give(std::uint64_t pages) noexcept;
    void withdraw() noexcept;
    std::uint64_t headroom();  // pages lease() would grant now
    std::uint64_t floor_pages() const noexcept;
    PageAsk ask();
    bool pressed() const noexcept;
    void answered() noexcept;
    void acknowledge_limits() noexcept;
    bool limit_open() const noexcept;  // ordered and not acknowledged
    void publish(const PageUsage &usage, const Counters &counters) noexcept;
    std::uint32_t freed_word() const noexcept { return shares_.front().tenant->freed_word(); }
    void wait_freed(std::uint32_t seen, std::uint64_t timeout_us) noexcept;
    const std::vector<Share> &shares() const noexcept { return shares_; }

  private:
    std::vector<Share> shares_;
};

}  // namespace elastickv
