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

std::uint64_t Leases::headroom() {
    std::uint64_t pages = ~std::uint64_t{0};
    for (auto &share : shares_) pages = std::min(pages, share.tenant->headroom() / share.page_cost);
    return pages;
}

std::uint64_t Leases::floor_pages() const noexcept {
    std::uint64_t pages = 0;
    for (const auto &share : shares_) pages = std::max(pages, share.tenant->floor() / share.page_cost);
    return pages;
}

PageAsk Leases::ask() {
    PageAsk sum;
    for (auto &share : shares_) {
        const Ask ask = share.tenant->ask();
        sum.free = std::max(sum.free, pages_up(ask.mapped_free + ask.as_freed, share.page_cost));
        sum.cached = std::max(sum.cached, pages_up(ask.cached, share.page_cost));
        sum.over_limit = std::max(sum.over_limit, pages_up(ask.over_limit, share.page_cost));
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
    return std::any_of(shares_.begin(), shares_.end(), [](const Share &s) {
        return s.tenant->limit_wanted().revision != s.tenant->limit_held().revision;
    });
}

void Leases::acknowledge_limits() noexcept {
    for (auto &share : shares_) {
        const Tenant::Limit wanted = share.tenant->limit_wanted();
        if (wanted.revision != share.tenant->limit_held().revision) share.tenant->acknowledge_limit(wanted);
    }
}

void Leases::publish(const PageUsage &usage, const Counters &counters) noexcept {
    for (auto &share : shares_) {
        const std::uint64_t cost = share.page_cost;
        share.tenant->publish({usage.virtual_pages * cost, usage.used * cost, usage.cached * cost, usage.free * cost,
                               usage.transit * cost},
                              counters);
    }
}

void Leases::wait_freed(std::uint32_t seen, std::uint64_t timeout_us) noexcept {
    shares_.front().tenant->wait_freed(seen, timeout_us);
}

}  // namespace elastickv
