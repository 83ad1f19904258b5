// Who gets bytes, and who gives them back: the sharing policy, as pure functions over a snapshot of the ledger.
//
// No clock, no lock, no input or output, no state: equal snapshots give equal answers.
//
// Words. A tenant *holds* what it leases, KV pages and static bytes together; floor and limit are bounds of what it
// holds. Its floor is *unmet* by the bytes it holds less. It is *active* while requests hold memory of it, it waits for
// bytes, or did so within kActiveNs. Its *weighted share* is the part, by weight among active tenants, of the bytes
// that are neither static nor unmanaged; an idle tenant's share is nothing (its floor still stands), so its cache goes
// first.
//
// Granting (decide). A request is granted when, after it,
//   1. the tenant holds no more than its wanted limit,
//   2. all held bytes + the unmet floors of the others + unmanaged bytes fit the capacity, and
//   3. no waiting demand of another tenant that ranks before it goes short (bytes within one's own floor pass freely).
// Rank: first those that have waited longer than kAgeingNs, the oldest first; then by (leased + wanted) / weight, the
// smallest first, so that who is furthest under its share is served next; equals by ticket, the older first.
// A demand keeps bytes from lower ranks only while what is free and what others can give would cover it, or once it
// has aged: otherwise bytes would lie idle for nobody. A demand that can never fit, or exceeds its tenant's limit, is
// ignored.
//
// Giving back (asks). What the live demands, what waits behind them and all unmet floors need beyond the free bytes,
// and those that are being given back already, is the deficit; where nobody waits, it is what held and unmanaged bytes
// are above the capacity: processes outside elastickv have grown. What waits behind a demand counts as far as its
// tenant's weighted share goes: it comes piece by piece, and memory in use is as long in coming as the requests on it
// run, so it is asked for before it is due. The deficit is taken, never below anybody's floor: first from mapped free
// pages of tenants above their share, then from all other mapped free pages (both in proportion; those of a tenant that
// waits itself and is within its share are left to it, unless somebody has waited longer than kAgeingNs), then from
// cached pages: lower priority first; within a priority what lies above the weighted share first, the furthest above
// first. What a tenant would have to take from itself is not asked of it: dropping its own cache is its own next choice
// anyway. While at most half of what is there is used or cached, who is asked for mapped free pages gives an eighth of
// its others `along`, down to a quarter of what it leases: who grows asks for one request's bytes at a time, and waits
// for each. On a fuller device they would be taken in large extents, which are long in coming back. Used pages are
// never asked back; `as_freed` tells a tenant above its share how many bytes to give back as its pages become free,
// before it uses them again, and also one within it where outsiders have grown or a floor is owed: one that is not met,
// of a tenant that waits, or was refused bytes within kDemandLifetimeNs and has been granted a part since. What the
// operator orders of one tenant, to come under a limit or to trim, is asked of it besides, whoever waits; a trim takes
// no more than is mapped free or cached, and nothing from under the floor. A tenant that has not answered an ask for
// kAnswerNs is passed over until it does; so is one whose bytes have been leaving for kStalledNs and do not become
// less, and nobody counts on those.
#pragma once

#include <array>
#include <cstdint>

#include "ledger/ledger.hpp"

namespace elastickv::policy {

inline constexpr std::uint64_t kDemandLifetimeNs = 100'000'000;  // after its last refresh
inline constexpr std::uint64_t kAgeingNs = 1'000'000'000;
inline constexpr std::uint64_t kActiveNs = 1'000'000'000;
inline constexpr std::uint64_t kAnswerNs = 500'000'000;
inline constexpr std::uint64_t kStalledNs = 2'000'000'000;

// A living tenant, as the policy sees it. Bytes below 2^48; times on the snapshot's clock.
struct Claim {
    int slot = -1;
    std::uint64_t floor = 0;
    std::uint64_t limit = kNoLimit;  // the wanted one: in force at once
    std::uint64_t leased = 0, static_bytes = 0;
    std::uint32_t weight = 1;
    std::int32_t priority = 0;
    std::uint64_t demand = 0;                               // refused and still wanted
    std::uint64_t backlog = 0;                              // wanted after it, in pieces
    std::uint64_t ticket = 0;                               // order of arrival of the demand
    std::uint64_t demand_since_ns = 0, demand_seen_ns = 0;  // the latter may outlast it where the floor is not met
    std::uint64_t used = 0, cached = 0, mapped_free = 0;
    std::uint64_t leaving = 0;      // leased still, and being unmapped
    bool stalled = false;           // and so for kStalledNs: nobody may count on them
    std::uint64_t active_ns = 0;    // last sign of work
    std::uint64_t ask_open_ns = 0;  // unanswered ask since; 0: none
    bool limit_now = false;
    std::uint64_t trim = 0;  // ordered and not answered

    std::uint64_t held() const noexcept { return leased + static_bytes; }
};

struct Snapshot {
    std::uint64_t now_ns = 0;
    std::uint64_t capacity = 0, unmanaged = 0;
    int count = 0;
    std::array<Claim, kMaxTenants> claims;  // the first `count`, by slot

    int find(int slot) const noexcept;  // index, or -1
};

enum class Verdict : std::uint8_t {
    grant,
    limit,     // above the tenant's own limit
    capacity,  // not free, or promised to floors of others
    waiting,   // free, but others wait who rank before
};

bool demand_alive(const Claim &claim, std::uint64_t now_ns) noexcept;

// May the tenant at `index` take `bytes` more?
Verdict decide(const Snapshot &snapshot, int index, std::uint64_t bytes) noexcept;
// The most bytes that decide() grants the tenant now.
std::uint64_t grantable(const Snapshot &snapshot, int index) noexcept;

// The most bytes more that the tenant could ever be granted as things stand, if everybody gave what can be given. A
// demand for more is ignored.
std::uint64_t reachable(const Snapshot &snapshot, int index) noexcept;

using Asks = std::array<Ask, kMaxTenants>;  // by index in the snapshot
// What every tenant should give back now.
Asks asks(const Snapshot &snapshot) noexcept;

// The tenant's weighted share, bytes.
std::uint64_t weighted_share(const Snapshot &snapshot, int index) noexcept;

}  // namespace elastickv::policy
