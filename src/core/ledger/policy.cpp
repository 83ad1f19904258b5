#include "ledger/policy.hpp"

#include <algorithm>

namespace elastickv::policy {

namespace {

using Bytes = std::int64_t;  // amounts are below 2^48, so sums of 64 of them and differences fit
__extension__ typedef unsigned __int128 Wide;

Bytes signed_bytes(std::uint64_t bytes) noexcept { return static_cast<Bytes>(std::min(bytes, std::uint64_t{1} << 48)); }
Bytes above(Bytes value, Bytes bound) noexcept { return value > bound ? value - bound : 0; }

struct Rank {
    bool aged;
    std::uint64_t load;
    std::uint32_t weight;
    std::uint64_t ticket;
};

bool before(const Rank &a, const Rank &b) noexcept {
    if (a.aged != b.aged) return a.aged;
    if (!a.aged) {
        const Wide left = Wide{a.load} * std::max(b.weight, 1U);
        const Wide right = Wide{b.load} * std::max(a.weight, 1U);
        if (left != right) return left < right;
    }
    return a.ticket < b.ticket;
}

bool is_aged(const Claim &claim, std::uint64_t now_ns) noexcept {
    return demand_alive(claim, now_ns) && now_ns > claim.demand_since_ns + kAgeingNs;
}

// Bounded on both sides: a time stamp from the future is damage, and must not keep bytes for ever.
bool refused_lately(const Claim &claim, std::uint64_t now_ns) noexcept {
    return claim.demand_seen_ns != 0 && now_ns <= claim.demand_seen_ns + kDemandLifetimeNs &&
           claim.demand_seen_ns <= now_ns + kDemandLifetimeNs;
}

bool is_active(const Claim &claim, std::uint64_t now_ns) noexcept {
    return demand_alive(claim, now_ns) || (claim.active_ns != 0 && now_ns < claim.active_ns + kActiveNs);
}

// One tenant's figures that several rules use.
struct Figures {
    Bytes held = 0, unmet = 0;
    Bytes want = 0;         // live demand, if it can be met at all
    Bytes beyond = 0;       // the part of `want` beyond the own floor
    Bytes behind = 0;       // what waits behind `want`, beyond the own floor and within the share
    Bytes owed = 0;         // of its floor, while it wants it
    Bytes reclaimable = 0;  // mapped free and cached bytes above the floor
    Bytes share = 0;

    bool waits() const noexcept { return want > 0 || owed > 0; }
    Rank rank{};
};

struct World {
    std::array<Figures, kMaxTenants> of;
    Bytes spare = 0;        // capacity less unmanaged, held and all unmet floors; may be negative
    Bytes wanted = 0;       // sum of `beyond` and `behind`
    Bytes reclaimable = 0;  // of all
    Bytes coming = 0;       // held, and being given back already
    Bytes excess = 0;       // held and unmanaged bytes above the capacity, less what is coming
    bool aged = false;      // somebody has waited too long
    Bytes owed = 0;         // what is missing, with all that is coming, for the floors of tenants that wait
};

void fill_shares(const Snapshot &snapshot, World &world) noexcept {
    Wide weights = 0;
    Bytes fixed = signed_bytes(snapshot.unmanaged);
    for (int i = 0; i < snapshot.count; ++i) {
        const Claim &claim = snapshot.claims[static_cast<std::size_t>(i)];
        fixed += signed_bytes(claim.static_bytes);
        if (is_active(claim, snapshot.now_ns)) weights += claim.weight;
    }
    const Bytes shared = above(signed_bytes(snapshot.capacity), fixed);
    for (int i = 0; i < snapshot.count; ++i) {
        const Claim &claim = snapshot.claims[static_cast<std::size_t>(i)];
        if (weights == 0 || !is_active(claim, snapshot.now_ns)) continue;
        world.of[static_cast<std::size_t>(i)].share =
            static_cast<Bytes>(static_cast<Wide>(shared) * claim.weight / weights);
    }
}

// What a tenant could hold if all others held only what they can never give: their floor, or their static bytes.
Bytes room_for(const Snapshot &snapshot, int index) noexcept {
    Bytes room = signed_bytes(snapshot.capacity) - signed_bytes(snapshot.unmanaged);
    for (int i = 0; i < snapshot.count; ++i) {
        const Claim &other = snapshot.claims[static_cast<std::size_t>(i)];
        if (i != index) room -= std::max(signed_bytes(other.floor), signed_bytes(other.static_bytes));
    }
    return std::min(room, signed_bytes(snapshot.claims[static_cast<std::size_t>(index)].limit));
}

void fill_demand(const Snapshot &snapshot, int index, Figures &figures) noexcept {
    const Claim &claim = snapshot.claims[static_cast<std::size_t>(index)];
    if (!refused_lately(claim, snapshot.now_ns)) return;
    if (claim.demand == 0) figures.owed = figures.unmet;  // a part was granted, and it will ask for the next
    if (claim.demand == 0) return;
    const Bytes want = signed_bytes(claim.demand);
    if (figures.held + want > room_for(snapshot, index)) return;
    figures.want = want;
    figures.owed = figures.unmet;
    figures.beyond = above(want, figures.unmet);
    figures.rank = {is_aged(claim, snapshot.now_ns), claim.leased + static_cast<std::uint64_t>(want), claim.weight,
                    claim.ticket};
}

// After fill_shares() and fill_demand().
void fill_behind(const Snapshot &snapshot, int index, Figures &figures) noexcept {
    const Claim &claim = snapshot.claims[static_cast<std::size_t>(index)];
    if (figures.want == 0) return;
    const Bytes within_share = above(figures.share, signed_bytes(claim.leased) + figures.want);
    const Bytes within_room = above(room_for(snapshot, index), figures.held + figures.want);
    const Bytes behind = std::min({signed_bytes(claim.backlog), within_share, within_room});
    figures.behind = above(behind, above(figures.unmet, figures.want));
}

World survey(const Snapshot &snapshot) noexcept {
    World world;
    world.spare = signed_bytes(snapshot.capacity) - signed_bytes(snapshot.unmanaged);
    Bytes held = 0;
    Bytes owed = 0;
    for (int i = 0; i < snapshot.count; ++i) {
        const Claim &claim = snapshot.claims[static_cast<std::size_t>(i)];
        Figures &figures = world.of[static_cast<std::size_t>(i)];
        figures.held = signed_bytes(claim.held());
        figures.unmet = above(signed_bytes(claim.floor), figures.held);
        figures.reclaimable = std::min({signed_bytes(claim.mapped_free) + signed_bytes(claim.cached),
                                        above(figures.held, signed_bytes(claim.floor)), signed_bytes(claim.leased)});
        fill_demand(snapshot, i, figures);
        world.spare -= figures.held + figures.unmet;
        held += figures.held;
        world.aged = world.aged || (figures.want > 0 && figures.rank.aged);
        owed += figures.owed;
        if (!claim.stalled) world.coming += std::min(signed_bytes(claim.leaving), signed_bytes(claim.leased));
        world.wanted += figures.beyond;
        world.reclaimable += figures.reclaimable;
    }
    world.excess = above(held + signed_bytes(snapshot.unmanaged), signed_bytes(snapshot.capacity) + world.coming);
    world.owed = std::min(owed, above(0, world.spare + world.coming));
    fill_shares(snapshot, world);
    for (int i = 0; i < snapshot.count; ++i) {
        Figures &figures = world.of[static_cast<std::size_t>(i)];
        fill_behind(snapshot, i, figures);
        world.wanted += figures.behind;
    }
    return world;
}

// Bytes that demands of others, ranking before `rank`, hold back from the tenant at `index`.
Bytes kept_for_others(const Snapshot &snapshot, const World &world, int index, const Rank &rank) noexcept {
    Bytes kept = 0;
    for (int i = 0; i < snapshot.count; ++i) {
        const Figures &other = world.of[static_cast<std::size_t>(i)];
        if (i == index || other.beyond == 0 || !before(other.rank, rank)) continue;
        const Bytes reachable = world.spare + world.coming + world.reclaimable - other.reclaimable;
        if (other.rank.aged || other.beyond <= reachable) kept += other.beyond;
    }
    return kept;
}

Verdict decide_in(const Snapshot &snapshot, const World &world, int index, std::uint64_t bytes) noexcept {
    const Claim &claim = snapshot.claims[static_cast<std::size_t>(index)];
    const Figures &own = world.of[static_cast<std::size_t>(index)];
    if (bytes == 0) return Verdict::grant;
    if (claim.limit != kNoLimit && (claim.held() > claim.limit || bytes > claim.limit - claim.held())) {
        return Verdict::limit;
    }
    if (bytes > snapshot.capacity) return Verdict::capacity;
    const Bytes wanted = signed_bytes(bytes);
    const Bytes free = world.spare + own.unmet;
    if (wanted > free) return Verdict::capacity;
    if (wanted <= own.unmet) return Verdict::grant;
    const bool waits = demand_alive(claim, snapshot.now_ns);
    const Rank rank{is_aged(claim, snapshot.now_ns), claim.leased + bytes, claim.weight,
                    waits ? claim.ticket : ~std::uint64_t{0}};
    if (wanted > free - kept_for_others(snapshot, world, index, rank)) return Verdict::waiting;
    return Verdict::grant;
}

// A piece of some tenant's bytes that may be asked back.
struct Portion {
    int index = 0;
    Bytes bytes = 0;
    bool own_aged = false;  // belongs to one that has itself waited long: comes last
    std::int32_t priority = 0;
    bool within_share = false;
    Bytes excess = 0;
    int slot = 0;
};

bool goes_first(const Portion &a, const Portion &b) noexcept {
    if (a.own_aged != b.own_aged) return b.own_aged;
    if (a.priority != b.priority) return a.priority < b.priority;
    if (a.within_share != b.within_share) return b.within_share;
    if (a.excess != b.excess) return a.excess > b.excess;
    return a.slot < b.slot;
}

using Amounts = std::array<Bytes, kMaxTenants>;

// The state of one asks() computation: what is still needed, and what was taken from each tenant so far.
struct Taking {
    const Snapshot &snapshot;
    const World &world;
    Bytes asked = 0;        // in all
    Bytes need = 0;         // still
    Amounts room{};         // most that may still be taken: never below the floor
    Amounts above_share{};  // part of the leased bytes above the share
    Amounts free{}, cached{}, freed_later{};

    // Takes from `available` in proportion, `into`; remainders go to the first ones, so that the sum is exact.
    void proportionally(const Amounts &available, Amounts &into) noexcept {
        Bytes total = 0;
        for (int i = 0; i < snapshot.count; ++i) total += available[static_cast<std::size_t>(i)];
        const Bytes target = std::min(need, total);
        if (target <= 0) return;
        Amounts part{};
        Bytes given = 0;
        for (int i = 0; i < snapshot.count; ++i) {
            const auto at = static_cast<std::size_t>(i);
            part[at] = static_cast<Bytes>(static_cast<Wide>(available[at]) * static_cast<Wide>(target) /
                                          static_cast<Wide>(total));
            given += part[at];
        }
        for (int i = 0; i < snapshot.count; ++i) {
            const auto at = static_cast<std::size_t>(i);
            const Bytes extra = std::min(target - given, available[at] - part[at]);
            given += extra;
            take(at, part[at] + extra, into);
        }
    }
    void take(std::size_t at, Bytes bytes, Amounts &into) noexcept {
        into[at] += bytes;
        room[at] -= bytes;
        above_share[at] = above(above_share[at], bytes);
        need -= bytes;
    }
};

void take_mapped_free(Taking &taking) noexcept {
    for (const bool everybody : {false, true}) {
        Amounts available{};
        for (int i = 0; i < taking.snapshot.count; ++i) {
            const auto at = static_cast<std::size_t>(i);
            const Bytes left = signed_bytes(taking.snapshot.claims[at].mapped_free) - taking.free[at];
            available[at] = std::min(left, taking.room[at]);
            // Who waits within its share is about to use them itself; only who has waited too long goes before it.
            if (!everybody || (taking.world.of[at].want > 0 && !taking.world.aged))
                available[at] = std::min(available[at], taking.above_share[at]);
        }
        taking.proportionally(available, taking.free);
    }
}

void take_cached(Taking &taking) noexcept {
    std::array<Portion, 2 * kMaxTenants> portions;
    std::size_t count = 0;
    for (int i = 0; i < taking.snapshot.count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const Claim &claim = taking.snapshot.claims[at];
        const Bytes cached = std::min(signed_bytes(claim.cached), taking.room[at]);
        const Bytes over = std::min(cached, taking.above_share[at]);
        const bool aged = is_aged(claim, taking.snapshot.now_ns);
        if (over > 0) portions[count++] = {i, over, aged, claim.priority, false, taking.above_share[at], claim.slot};
        if (cached > over) {
            const Bytes excess = signed_bytes(claim.leased) - taking.world.of[at].share;
            portions[count++] = {i, cached - over, aged, claim.priority, true, excess, claim.slot};
        }
    }
    std::sort(portions.begin(), portions.begin() + static_cast<std::ptrdiff_t>(count), goes_first);
    for (std::size_t p = 0; p < count && taking.need > 0; ++p) {
        taking.take(static_cast<std::size_t>(portions[p].index), std::min(portions[p].bytes, taking.need),
                    taking.cached);
    }
}

// From those above their share; from everybody where outsiders need the bytes, for they do not wait, and where a floor
// is owed, for it is guaranteed.
void take_as_freed(Taking &taking) noexcept {
    for (const bool everybody : {false, true}) {
        const Bytes due = std::max(taking.world.excess, taking.world.owed);
        if (everybody) taking.need = std::min(taking.need, above(due, taking.asked - taking.need));
        Amounts available{};
        for (int i = 0; i < taking.snapshot.count; ++i) {
            const auto at = static_cast<std::size_t>(i);
            const Bytes left = signed_bytes(taking.snapshot.claims[at].used) - taking.freed_later[at];
            available[at] = std::min(left, taking.room[at]);
            if (!everybody) available[at] = std::min(available[at], taking.above_share[at]);
        }
        taking.proportionally(available, taking.freed_later);
    }
}

// What is asked of one tenant is at most what the others and the device lack without its own demand.
Ask asked_of(const Taking &taking, std::size_t at) noexcept {
    const Bytes others = taking.world.wanted - taking.world.of[at].beyond - taking.world.of[at].behind;
    bool others_wait = false;
    for (int i = 0; i < taking.snapshot.count; ++i) {
        const auto j = static_cast<std::size_t>(i);
        others_wait = others_wait || (j != at && taking.world.of[j].waits());
    }
    const Bytes free = taking.world.spare + taking.world.coming;
    Bytes most = std::max(others_wait ? above(others, free) : 0, taking.world.excess);
    Ask ask;
    const auto part = [&most](Bytes amount) {
        const Bytes bytes = std::min(amount, most);
        most -= bytes;
        return static_cast<std::uint64_t>(bytes);
    };
    ask.mapped_free = part(taking.free[at]);
    ask.cached = part(taking.cached[at]);
    ask.as_freed = part(taking.freed_later[at]);
    return ask;
}

// See policy.hpp. In bytes; the giver rounds down to its pages.
void add_along(const Taking &taking, Asks &asks) noexcept {
    constexpr Bytes kPart = 8, kKept = 4, kFuller = 2;
    Bytes there = above(taking.world.spare, 0), busy = 0;
    for (int i = 0; i < taking.snapshot.count; ++i) {
        const Claim &claim = taking.snapshot.claims[static_cast<std::size_t>(i)];
        there += signed_bytes(claim.leased);
        busy += signed_bytes(claim.used) + signed_bytes(claim.cached);
    }
    if (busy > there / kFuller) return;
    for (int i = 0; i < taking.snapshot.count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const Claim &claim = taking.snapshot.claims[at];
        const Bytes asked = signed_bytes(asks[at].mapped_free);
        const Bytes rest = signed_bytes(asks[at].cached + asks[at].as_freed);
        const Bytes others = above(std::min(signed_bytes(claim.mapped_free), taking.room[at] - rest), asked);
        if (asked != 0)
            asks[at].along = static_cast<std::uint64_t>(above(others, signed_bytes(claim.leased) / kKept) / kPart);
    }
}

}  // namespace

int Snapshot::find(int slot) const noexcept {
    for (int i = 0; i < count; ++i) {
        if (claims[static_cast<std::size_t>(i)].slot == slot) return i;
    }
    return -1;
}

bool demand_alive(const Claim &claim, std::uint64_t now_ns) noexcept {
    return claim.demand > 0 && refused_lately(claim, now_ns);
}

Verdict decide(const Snapshot &snapshot, int index, std::uint64_t bytes) noexcept {
    return decide_in(snapshot, survey(snapshot), index, bytes);
}

std::uint64_t grantable(const Snapshot &snapshot, int index) noexcept {
    const World world = survey(snapshot);
    std::uint64_t good = 0;
    std::uint64_t bad =
        snapshot.capacity + 1;  // a larger request ranks later and needs more, so the answer is monotone
    while (bad - good > 1) {
        const std::uint64_t middle = good + (bad - good) / 2;
        (decide_in(snapshot, world, index, middle) == Verdict::grant ? good : bad) = middle;
    }
    return good;
}

Asks asks(const Snapshot &snapshot) noexcept {
    Asks result{};
    const World world = survey(snapshot);
    Taking taking{snapshot, world};
    bool anybody_waits = false;
    for (int i = 0; i < snapshot.count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const Claim &claim = snapshot.claims[at];
        const Figures &figures = world.of[at];
        anybody_waits = anybody_waits || figures.waits();
        const bool silent = claim.ask_open_ns != 0 && snapshot.now_ns > claim.ask_open_ns + kAnswerNs;
        if (silent || claim.stalled) continue;
        const Bytes leaving = std::min(signed_bytes(claim.leaving), signed_bytes(claim.leased));
        const Bytes stays = signed_bytes(claim.leased) - leaving;
        taking.room[at] = std::min(above(figures.held - leaving, signed_bytes(claim.floor)), stays);
        taking.above_share[at] = is_aged(claim, snapshot.now_ns) ? 0 : above(stays, figures.share);
    }
    taking.asked = taking.need = anybody_waits ? above(world.wanted, world.spare + world.coming) : world.excess;
    take_mapped_free(taking);
    take_cached(taking);
    take_as_freed(taking);
    for (int i = 0; i < snapshot.count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        result[at] = asked_of(taking, at);
        const Claim &claim = snapshot.claims[at];
        if (claim.limit != kNoLimit && claim.held() > claim.limit) {
            result[at].over_limit = claim.held() - claim.limit;
            result[at].now = claim.limit_now;
        }
        result[at].trim = std::min(claim.trim, static_cast<std::uint64_t>(world.of[at].reclaimable));
    }
    add_along(taking, result);
    return result;
}

std::uint64_t reachable(const Snapshot &snapshot, int index) noexcept {
    const Claim &claim = snapshot.claims[static_cast<std::size_t>(index)];
    return static_cast<std::uint64_t>(above(room_for(snapshot, index), signed_bytes(claim.held())));
}

std::uint64_t weighted_share(const Snapshot &snapshot, int index) noexcept {
    return static_cast<std::uint64_t>(survey(snapshot).of[static_cast<std::size_t>(index)].share);
}

}  // namespace elastickv::policy
