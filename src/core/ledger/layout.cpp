#include "ledger/layout.hpp"

#include <algorithm>

namespace elastickv::ledger {

namespace {
std::uint64_t fnv1a(const unsigned char *bytes, std::size_t count) noexcept {
    std::uint64_t hash = 0xcbf29ce484222325;
    for (std::size_t i = 0; i < count; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3;
    return hash;
}
std::uint64_t capacity_check(std::uint64_t bytes) noexcept {
    std::uint64_t mixed = bytes * 0x9e3779b97f4a7c15;
    mixed ^= mixed >> 32;
    return (mixed * 0xbf58476d1ce4e5b9) >> 48;
}
}  // namespace

void Revised::store(const Tenant::Limit &limit) noexcept {
    const std::uint64_t next = sequence.load(std::memory_order_relaxed) + 1;
    Pair &pair = pairs[next % 2];
    pair.bytes.store(limit.bytes, std::memory_order_release);
    pair.revision.store(limit.revision, std::memory_order_release);
    pair.now.store(limit.now ? 1 : 0, std::memory_order_release);
    sequence.store(next, std::memory_order_release);
}

Tenant::Limit Revised::load() const noexcept {
    // Each further round means that a writer got on meanwhile; writers are rare, so this ends at once.
    while (true) {
        const std::uint64_t now = sequence.load(std::memory_order_acquire);
        const Pair &pair = pairs[now % 2];
        Tenant::Limit limit;
        limit.bytes = pair.bytes.load(std::memory_order_acquire);
        limit.revision = pair.revision.load(std::memory_order_acquire);
        limit.now = pair.now.load(std::memory_order_acquire) != 0;
        if (sequence.load(std::memory_order_relaxed) == now) return limit;
    }
}

void Latencies::add(std::uint64_t ns) noexcept {
    const auto bound = std::lower_bound(kLatencyBoundsUs.begin(), kLatencyBoundsUs.end(), (ns + 999) / 1000);
    counts[static_cast<std::size_t>(bound - kLatencyBoundsUs.begin())].fetch_add(1, std::memory_order_relaxed);
    sum_ns.fetch_add(ns, std::memory_order_relaxed);
}

Histogram Latencies::load() const noexcept {
    Histogram histogram;
    for (std::size_t i = 0; i < counts.size(); ++i) histogram.counts[i] = counts[i].load(std::memory_order_relaxed);
    histogram.sum_ns = sum_ns.load(std::memory_order_relaxed);
    return histogram;
}

void Latencies::clear() noexcept {
    for (Word &count : counts) count.store(0, std::memory_order_relaxed);
    sum_ns.store(0, std::memory_order_relaxed);
}

std::uint64_t pack_capacity(std::uint64_t bytes) noexcept { return capacity_check(bytes) << 48 | bytes; }

bool unpack_capacity(std::uint64_t word, std::uint64_t &bytes) noexcept {
    bytes = word & (kMaxBytes - 1);
    return bytes != 0 && pack_capacity(bytes) == word;
}

std::uint64_t header_checksum(const ConstantHeader &header) noexcept {
    return fnv1a(reinterpret_cast<const unsigned char *>(&header), offsetof(ConstantHeader, checksum));
}

ConstantHeader make_constant_header(const std::string &boot_id, const std::string &device,
                                    std::uint64_t alive_inode) noexcept {
    ConstantHeader header{};
    header.magic = kMagic;
    header.version = kFormatVersion;
    header.header_bytes = sizeof(Header);
    header.row_bytes = sizeof(Row);
    header.rows = kMaxTenants;
    header.members = kMaxMembers;
    header.lock_abi = kLockAbi;
    header.alive_inode = alive_inode;
    boot_id.copy(header.boot_id.data(), header.boot_id.size() - 1);
    device.copy(header.device.data(), header.device.size() - 1);
    header.checksum = header_checksum(header);
    return header;
}

void clear_life(Row &row) noexcept {
    row.incarnation.store(0, std::memory_order_release);
    for (Word *word : {&row.demand_seen_ns, &row.demand,          &row.leased,
                       &row.static_bytes,   &row.floor,           &row.used,
                       &row.cached,         &row.mapped_free,     &row.transit,
                       &row.leaving,        &row.pinned,          &row.virtual_bytes,
                       &row.ask_open_ns,    &row.ask_late_ns,     &row.active_ns,
                       &row.misses,         &row.evicted_need,    &row.evicted_neighbour,
                       &row.evicted_limit,  &row.evicted_idle,    &row.evicted_budget,
                       &row.asked,          &row.answered,        &row.late,
                       &row.demand_ticket,  &row.demand_since_ns, &row.backlog}) {
        word->store(0, std::memory_order_relaxed);
    }
    row.trim_wanted.store({0, 0, false});
    row.trim_done.store({0, 0, false});
    for (Latencies &one : row.latencies) one.clear();
    for (Word &mapped : row.mapped) mapped.store(0, std::memory_order_relaxed);
    for (Word &used : row.static_used) used.store(0, std::memory_order_relaxed);
}

}  // namespace elastickv::ledger
