#include "pool/leases.hpp"

#include <algorithm>

namespace elastickv {
namespace {

std::uint64_t pages_up(std::uint64_t bytes, std::uint64_t cost) { return bytes / cost + (bytes % cost != 0 ? 1 : 0); }

}  // namespace

Status Leases::lease(std::uint64_t pages, bool ring) {
    for (std::size_t i = 0; i < shares_.size(); ++i) {
        Status status = shares_[i].tenant->lease(pages * shares_[i].page_cost, ring);
        if (status.ok()) continue;
        while (i-- > 0) shares_[i].tenant->give(pages * shares_[i].page_cost);
        return status;
    }
    return {};
}

void Leases::give(std::uint64_t pages) noexcept {
    for (auto &share : shares_) share.tenant->give(pages * share.page_cost);
}

void Leases::withdraw() noexcept {
    for (auto &share : shares_) share.tenant->withdraw_demand();
}

void Leases::set_backlog(std::uint64_t pages) noexcept {
    for (auto &share : shares_) share.tenant->set_backlog(pages * share.page_cost);
}

std::uint64_t Leases::reachable() {
    std::uint64_t pages = ~std::uint64_t{0};
    for (auto &share : shares_) pages = std::min(pages, share.tenant->reachable() / share.page_cost);
    return pages;
}

std::uint64_t Leases::headroom() {
    std::uint64_t pages = ~std::uint64_t{0};
    for (auto &share : shares_) pages = std::min(pages, share.tenant->headroom() / share.page_cost);
    return pages;
}

std::uint64_t Leases::floor_pages() const noexcept {
    std::uint64_t pages = 0;
    for (const auto &share : shares_) {
        const std::uint64_t floor = share.tenant->floor(), besides = share.tenant->static_bytes();
        if (floor > besides) pages = std::max(pages, (floor - besides) / share.page_cost);
    }
    return pages;
}

PageAsk Leases::ask() {
    PageAsk sum;
    for (auto &share : shares_) {
        const Ask ask = share.tenant->ask();
        sum.free = std::max(sum.free, pages_up(ask.mapped_free + ask.as_freed, share.page_cost));
        sum.in_use = std::max(sum.in_use, pages_up(ask.as_freed, share.page_cost));
        sum.along = std::max(sum.along, ask.along / share.page_cost);
        sum.cached = std::max(sum.cached, pages_up(ask.cached, share.page_cost));
    }
    return sum;
}

bool Leases::pressed() const noexcept {
    return std::any_of(shares_.begin(), shares_.end(), [](const Share &s) { return s.tenant->pressed(); });
}

void Leases::answered() noexcept {
    for (auto &share : shares_) share.tenant->answered();
}

bool Leases::limit_open() const noexcept {
    return std::any_of(shares_.begin(), shares_.end(),
                       [](const Share &s) { return open(*s.tenant, s.tenant->limit_wanted()); });
}

bool Leases::read_orders() {
    bool any = false;
    for (std::size_t i = 0; i < shares_.size(); ++i) {
        const Tenant &tenant = *shares_[i].tenant;
        Order &order = orders_[i];
        order.limit = tenant.limit_wanted();
        order.limit_open = open(tenant, order.limit);
        order.trim = tenant.trim_wanted();
        order.trim_open = order.trim.revision != tenant.trim_done().revision;
        any = any || order.limit_open || order.trim_open;
    }
    return any;
}

std::uint64_t Leases::trim() const noexcept {
    std::uint64_t pages = 0;
    for (std::size_t i = 0; i < shares_.size(); ++i)
        if (orders_[i].trim_open) pages = std::max(pages, pages_up(orders_[i].trim.bytes, shares_[i].page_cost));
    return pages;
}

void Leases::answer_orders(std::uint64_t trimmed) noexcept {
    for (std::size_t i = 0; i < shares_.size(); ++i) {
        Tenant &tenant = *shares_[i].tenant;
        const Order &order = orders_[i];
        if (order.limit_open && (!order.limit.now || within(tenant, order.limit)))
            tenant.acknowledge_limit(order.limit);
        if (order.trim_open) tenant.acknowledge_trim({trimmed * shares_[i].page_cost, order.trim.revision});
    }
}

void Leases::settle_limits() noexcept {
    for (auto &share : shares_) {
        const Tenant::Limit wanted = share.tenant->limit_wanted();
        if (wanted.now && open(*share.tenant, wanted) && within(*share.tenant, wanted))
            share.tenant->acknowledge_limit(wanted);
    }
}

std::uint64_t Leases::over_limit(std::uint64_t pages, bool now) const noexcept {
    std::uint64_t over = 0;
    for (const Share &share : shares_) {
        const Tenant::Limit wanted = share.tenant->limit_wanted();
        if (wanted.bytes == kNoLimit || (now && !wanted.now)) continue;
        const std::uint64_t held = pages * share.page_cost + share.tenant->static_bytes();
        if (held > wanted.bytes) over = std::max(over, pages_up(held - wanted.bytes, share.page_cost));
    }
    return std::min(over, pages);
}

void Leases::observe(Latency what, std::uint64_t ns) noexcept { shares_.front().tenant->observe(what, ns); }

void Leases::publish(const PageUsage &usage, bool working, const Counters &counters) noexcept {
    for (auto &share : shares_) {
        const std::uint64_t cost = share.page_cost;
        share.tenant->publish({usage.virtual_pages * cost, usage.used * cost, usage.cached * cost, usage.free * cost,
                               usage.transit * cost, usage.leaving * cost, usage.pinned * cost, working},
                              counters);
    }
}

void Leases::wait_freed(std::uint32_t seen, std::uint64_t timeout_us) noexcept {
    shares_.front().tenant->wait_freed(seen, timeout_us);
}

}  // namespace elastickv
