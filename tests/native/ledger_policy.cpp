// The sharing policy: each rule by example, then properties over random snapshots.
#include "ledger/policy.hpp"

#include <random>

#include "ledger_support.hpp"

using namespace ledgertest;
using namespace elastickv::policy;

namespace {

constexpr std::uint64_t kNow = 10'000'000'000;

Snapshot world(std::uint64_t capacity) {
    Snapshot snapshot;
    snapshot.now_ns = kNow;
    snapshot.capacity = capacity * MiB;
    return snapshot;
}
// A tenant that is at work: `used` MiB of its leased ones.
Claim &add(Snapshot &snapshot, std::uint64_t leased, std::uint64_t cached = 0, std::uint64_t mapped_free = 0) {
    Claim &claim = snapshot.claims[static_cast<std::size_t>(snapshot.count)];
    claim.slot = snapshot.count++;
    claim.leased = leased * MiB;
    claim.cached = cached * MiB;
    claim.mapped_free = mapped_free * MiB;
    claim.used = (leased - cached - mapped_free) * MiB;
    claim.active_ns = kNow - 1;
    return claim;
}
void demand(Claim &claim, std::uint64_t bytes, std::uint64_t ticket, std::uint64_t waited_ms = 1) {
    claim.demand = bytes * MiB;
    claim.ticket = ticket;
    claim.demand_since_ns = kNow - waited_ms * 1'000'000;
    claim.demand_seen_ns = kNow;
}
void idle(Claim &claim) {
    claim.cached += claim.used;
    claim.used = 0;
    claim.active_ns = kNow - 2 * kActiveNs;
}

}  // namespace

TEST("ledger policy: limit, capacity and the floors of others") {
    Snapshot s = world(100);
    add(s, 40).limit = 50 * MiB;
    add(s, 10).floor = 30 * MiB;
    CHECK(decide(s, 0, 10 * MiB) == Verdict::grant);
    CHECK(decide(s, 0, 10 * MiB + 1) == Verdict::limit);
    s.claims[0].limit = kNoLimit;
    CHECK(decide(s, 0, 30 * MiB) == Verdict::grant);
    CHECK(decide(s, 0, 30 * MiB + 1) == Verdict::capacity);
    CHECK(decide(s, 1, 50 * MiB) == Verdict::grant);
    CHECK(decide(s, 1, 51 * MiB) == Verdict::capacity);
    s.unmanaged = 20 * MiB;
    CHECK_EQ(grantable(s, 0), 10 * MiB);
    s.claims[0].limit = 20 * MiB;  // lowered under what it holds
    CHECK(decide(s, 0, 1) == Verdict::limit);
    CHECK_EQ(asks(s)[0].over_limit, 20 * MiB);
}

TEST("ledger policy: the one furthest under its weighted share comes first") {
    Snapshot s = world(100);
    add(s, 60);
    add(s, 30);
    demand(s.claims[1], 10, 5);
    CHECK(decide(s, 0, MiB) == Verdict::waiting);
    CHECK(decide(s, 1, 10 * MiB) == Verdict::grant);
    s.claims[0].weight = 4;  // 61/4 is less than 40/1
    CHECK(decide(s, 0, 10 * MiB) == Verdict::grant);
    s.claims[1].demand_seen_ns = kNow - kDemandLifetimeNs - 1;
    s.claims[0].weight = 1;
    CHECK(decide(s, 0, MiB) == Verdict::grant);
}

TEST("ledger policy: equals by ticket, the long waiting first of all") {
    Snapshot s = world(100);
    add(s, 45);
    add(s, 45);
    demand(s.claims[0], 10, 7);
    demand(s.claims[1], 10, 6);
    CHECK(decide(s, 0, 10 * MiB) == Verdict::waiting);
    CHECK(decide(s, 1, 10 * MiB) == Verdict::grant);
    Snapshot aged = world(100);
    add(aged, 10);
    add(aged, 80);
    demand(aged.claims[1], 10, 3, 1500);
    CHECK(decide(aged, 0, MiB) == Verdict::waiting);  // although it is far under its share
    CHECK(decide(aged, 1, 10 * MiB) == Verdict::grant);
}

TEST("ledger policy: a floor's bytes are always its owner's") {
    Snapshot s = world(100);
    add(s, 60);
    add(s, 0).floor = 20 * MiB;
    add(s, 10);
    demand(s.claims[2], 10, 1, 3000);
    CHECK(decide(s, 1, 20 * MiB) == Verdict::grant);
    CHECK(decide(s, 1, 21 * MiB) == Verdict::waiting);
    CHECK(decide(s, 2, 10 * MiB) == Verdict::grant);
    CHECK(decide(s, 0, MiB) == Verdict::waiting);
}

TEST("ledger policy: bytes are not kept idle for a demand that nobody can meet now") {
    Snapshot s = world(100);
    add(s, 90);  // all in use
    add(s, 4);
    add(s, 0).weight = 10;
    demand(s.claims[2], 50, 1);
    CHECK(decide(s, 1, 6 * MiB) == Verdict::grant);
    s.claims[0].cached = 60 * MiB;  // now it can be met
    CHECK(decide(s, 1, 6 * MiB) == Verdict::waiting);
    s.claims[0].cached = 0;
    demand(s.claims[2], 50, 1, 1500);  // and one that waits long gathers what becomes free
    CHECK(decide(s, 1, 6 * MiB) == Verdict::waiting);
    demand(s.claims[2], 101, 1, 1500);  // but not one that can never be met
    CHECK(decide(s, 1, 6 * MiB) == Verdict::grant);
    demand(s.claims[2], 50, 1, 1500);  // nor one that its own limit forbids
    s.claims[2].limit = 49 * MiB;
    CHECK(decide(s, 1, 6 * MiB) == Verdict::grant);
    CHECK_EQ(asks(s)[0].cached, 0U);
}

TEST("ledger policy: mapped free pages go first, in proportion, those above their share before others") {
    Snapshot s = world(100);
    add(s, 60, 20, 10);
    add(s, 40, 10, 10);
    add(s, 0);
    demand(s.claims[2], 8, 1);
    Asks a = asks(s);
    CHECK_EQ(a[0].mapped_free * 10 / MiB, 48U);  // shares are 33.3, so 10 and 6.7 to take 8 from: 4.8 and 3.2
    CHECK_EQ(a[0].mapped_free + a[1].mapped_free, 8 * MiB);
    CHECK_EQ(a[0].cached + a[1].cached, 0U);
    demand(s.claims[2], 18, 1);
    a = asks(s);
    CHECK_EQ(a[0].mapped_free, 10 * MiB);
    CHECK(a[1].mapped_free >= 6 * MiB && a[1].mapped_free <= 10 * MiB);
    CHECK_EQ(a[0].mapped_free + a[1].mapped_free + a[0].cached, 18 * MiB);
}

TEST("ledger policy: free pages go along while at most half of what is there is used or cached") {
    Snapshot s = world(100);
    add(s, 96, 0, 80);
    add(s, 2);
    CHECK_EQ(asks(s)[0].along, 0U);
    demand(s.claims[1], 4, 1);
    CHECK_EQ(asks(s)[0].mapped_free, 2 * MiB);
    CHECK_EQ(asks(s)[0].along, (80 - 2 - 96 / 4) * MiB / 8);
    s.claims[0].cached = 33 * MiB;  // 16 and 2 are used
    CHECK_EQ(asks(s)[0].along, 0U);
}

TEST("ledger policy: cached pages of the one furthest above its share, lower priority first, idle ones at once") {
    Snapshot s = world(100);
    add(s, 50, 30);
    add(s, 40, 30);
    add(s, 10);
    demand(s.claims[2], 10, 1);
    Asks a = asks(s);
    CHECK_EQ(a[0].cached, 10 * MiB);
    CHECK_EQ(a[1].cached, 0U);
    s.claims[0].priority = 1;
    a = asks(s);
    CHECK_EQ(a[0].cached, 0U);
    CHECK_EQ(a[1].cached, 10 * MiB);
    s.claims[0].priority = 0;
    idle(s.claims[1]);  // no share any more: 40 above it
    a = asks(s);
    CHECK_EQ(a[1].cached, 10 * MiB);
    CHECK_EQ(weighted_share(s, 1), 0U);
    CHECK_EQ(weighted_share(s, 0), 50 * MiB);
}

TEST("ledger policy: a busy tenant gets an idle one's cache before it has to drop its own") {
    Snapshot s = world(100);
    add(s, 60, 50);
    add(s, 40, 40);
    idle(s.claims[1]);
    demand(s.claims[0], 10, 1);
    CHECK_EQ(asks(s)[1].cached, 10 * MiB);
    Snapshot both = world(100);  // both at work: who is above its share drops its own
    add(both, 60, 50);
    add(both, 40, 30);
    demand(both.claims[0], 10, 1);
    CHECK_EQ(asks(both)[1].cached, 0U);
    CHECK_EQ(asks(both)[0].cached, 0U);
    demand(both.claims[0], 10, 1, 1500);  // unless it has waited for long
    CHECK_EQ(asks(both)[1].cached, 10 * MiB);
}

TEST("ledger policy: nobody gives below its floor, nobody gives what is in use, a silent one is passed over") {
    Snapshot s = world(100);
    add(s, 60, 50).floor = 55 * MiB;
    add(s, 40, 10);
    add(s, 0);
    demand(s.claims[2], 30, 1);
    Asks a = asks(s);
    CHECK_EQ(a[0].cached, 5 * MiB);
    CHECK_EQ(a[1].cached, 10 * MiB);
    CHECK_EQ(a[1].as_freed, 0U);  // 30 used, 33 is its share
    demand(s.claims[2], 10, 1);
    s.claims[0].ask_open_ns = kNow - kAnswerNs - 1;
    a = asks(s);
    CHECK_EQ(a[0].cached, 0U);
    CHECK_EQ(a[1].cached, 10 * MiB);
}

TEST("ledger policy: used pages above the share are asked for as they become free") {
    Snapshot s = world(100);
    add(s, 100);
    add(s, 0);
    demand(s.claims[1], 8, 1);
    Asks a = asks(s);
    CHECK_EQ(a[0].as_freed, 8 * MiB);
    CHECK_EQ(a[0].cached + a[0].mapped_free, 0U);
    s.claims[0].leased = 50 * MiB;
    s.claims[0].used = 50 * MiB;
    s.unmanaged = 0;
    s.claims[1].leased = 50 * MiB;
    a = asks(s);
    CHECK_EQ(a[0].as_freed, 0U);
}

TEST("ledger policy: what waits behind a demand is asked for as far as its tenant's share goes") {
    Snapshot s = world(100);
    add(s, 90);
    add(s, 10);
    demand(s.claims[1], 8, 1);
    s.claims[1].backlog = 20 * MiB;
    CHECK_EQ(asks(s)[0].as_freed, 28 * MiB);
    CHECK_EQ(asks(s)[1].as_freed, 0U);  // not of itself
    s.claims[1].backlog = 1000 * MiB;
    CHECK_EQ(asks(s)[0].as_freed, 40 * MiB);  // its share is 50, and it holds 10
    s.claims[1].limit = 25 * MiB;
    CHECK_EQ(asks(s)[0].as_freed, 15 * MiB);
    s.claims[1].limit = kNoLimit;
    s.claims[1].floor = 30 * MiB;  // 20 of the 40 are owed anyway
    CHECK_EQ(asks(s)[0].as_freed, 40 * MiB);
    CHECK(decide(s, 0, MiB) != Verdict::grant);
    s.claims[1].demand_seen_ns = kNow - 2 * kDemandLifetimeNs;  // nobody waits any more
    s.claims[1].floor = 0;
    CHECK_EQ(asks(s)[0].as_freed, 0U);
}

TEST("ledger policy: a backlog keeps no bytes from those who rank lower") {
    Snapshot s = world(100);
    add(s, 60);
    add(s, 10);
    demand(s.claims[1], 8, 1);
    s.claims[1].backlog = 30 * MiB;
    CHECK_EQ(grantable(s, 0), 22 * MiB);  // 30 are free, and the demand itself is kept
}

TEST("ledger policy: an unmet floor is asked back as soon as its owner wants it") {
    Snapshot s = world(100);
    add(s, 100, 60);
    add(s, 0).floor = 20 * MiB;
    CHECK_EQ(asks(s)[0].cached, 0U);
    demand(s.claims[1], 5, 1);
    CHECK_EQ(asks(s)[0].cached, 20 * MiB);
}

TEST("ledger policy: a floor above the share is owed by those within theirs too, of what becomes free") {
    Snapshot s = world(100);
    add(s, 50).weight = 5;
    add(s, 50).weight = 4;
    Claim &late = add(s, 0);
    late.floor = 30 * MiB;
    CHECK_EQ(asks(s)[0].as_freed + asks(s)[1].as_freed, 0U);  // it does not want it yet
    demand(late, 1, 1);
    const Asks a = asks(s);
    CHECK_EQ(a[0].as_freed + a[1].as_freed, 30 * MiB);  // its share is 10
    CHECK(decide(s, 0, 1) == Verdict::capacity);
    s.claims[0].floor = s.claims[1].floor = 40 * MiB;
    CHECK_EQ(asks(s)[0].as_freed, 10 * MiB);  // never below a floor
}

TEST("ledger policy: a floor stays owed for a while after a part of it was granted") {
    Snapshot s = world(100);
    add(s, 50);
    add(s, 40);
    Claim &late = add(s, 10);
    late.floor = 30 * MiB;
    late.demand_seen_ns = kNow - kDemandLifetimeNs;  // refused then, granted since
    Asks a = asks(s);
    CHECK_EQ(a[0].as_freed + a[1].as_freed, 20 * MiB);
    CHECK_EQ(a[2].as_freed, 0U);
    CHECK(decide(s, 2, MiB) == Verdict::capacity);
    late.demand_seen_ns -= 1;
    a = asks(s);
    CHECK_EQ(a[0].as_freed + a[1].as_freed, 0U);
    late.demand_seen_ns = kNow;
    late.leased = late.floor;  // met, at the cost of the first
    s.claims[0].leased = s.claims[0].used = 30 * MiB;
    a = asks(s);
    CHECK_EQ(a[0].as_freed + a[1].as_freed, 0U);
}

TEST("ledger policy: how much a demand may be for") {
    Snapshot s = world(100);
    add(s, 30);
    add(s, 20).floor = 40 * MiB;
    add(s, 5).static_bytes = 10 * MiB;
    CHECK_EQ(reachable(s, 0), 20 * MiB);
    s.claims[0].limit = 35 * MiB;
    CHECK_EQ(reachable(s, 0), 5 * MiB);
    s.claims[0].limit = 10 * MiB;
    CHECK_EQ(reachable(s, 0), 0U);
}

TEST("ledger policy: what is being given back already is not asked again, and is kept for who waits first") {
    Snapshot s = world(100);
    Claim &giver = add(s, 60);
    giver.used = 20 * MiB;
    giver.leaving = 40 * MiB;
    add(s, 40, 30);
    Claim &waits = add(s, 0);
    demand(waits, 40, 1);
    const Asks none = asks(s);
    for (std::size_t i = 0; i < 2; ++i) CHECK_EQ(none[i].mapped_free + none[i].cached + none[i].as_freed, 0U);
    waits.demand = 45 * MiB;
    CHECK_EQ(asks(s)[1].cached, 5 * MiB);
    waits.demand = 40 * MiB;
    giver.leased = 55 * MiB;  // a first part has come: not for whoever asks next
    giver.leaving = 35 * MiB;
    s.claims[1].cached = 0;
    s.claims[1].used = 40 * MiB;
    CHECK(decide(s, 1, 5 * MiB) == Verdict::waiting);
}

TEST("ledger policy: what outsiders take above the capacity is asked back although nobody waits") {
    Snapshot s = world(100);
    add(s, 60, 30, 10);
    add(s, 30, 5).floor = 28 * MiB;
    s.unmanaged = 10 * MiB;
    CHECK_EQ(asks(s)[0].mapped_free + asks(s)[0].cached, 0U);
    s.unmanaged = 15 * MiB;
    CHECK_EQ(asks(s)[0].mapped_free, 5 * MiB);
    s.unmanaged = 45 * MiB;  // 35 too many
    Asks a = asks(s);
    CHECK_EQ(a[0].mapped_free, 10 * MiB);
    CHECK_EQ(a[0].cached + a[1].cached, 25 * MiB);
    CHECK(a[0].cached >= 22 * MiB);  // it is far above its share
    s.unmanaged = 60 * MiB;          // 50 too many: all that is cached above the floors, the rest as it becomes free
    a = asks(s);
    CHECK_EQ(a[0].cached, 30 * MiB);
    CHECK_EQ(a[1].cached, 2 * MiB);
    CHECK_EQ(a[0].as_freed + a[1].as_freed, 8 * MiB);
    CHECK(decide(s, 0, 1) == Verdict::capacity);
    demand(s.claims[0], 3, 1);  // a waiting one does not make the others give more than it and the device lack
    a = asks(s);
    CHECK_EQ(a[0].mapped_free + a[0].cached + a[0].as_freed + a[1].cached + a[1].as_freed, 50 * MiB);
}

namespace {

Snapshot random_snapshot(std::mt19937_64 &random) {
    Snapshot s = world(64 + random() % 1000);
    const auto upto = [&](std::uint64_t most) { return most == 0 ? 0 : random() % (most + 1); };
    std::uint64_t left = s.capacity;
    std::uint64_t promised = 0;
    const int count = 1 + static_cast<int>(random() % kMaxTenants);
    s.unmanaged = random() % 3 == 0 ? upto(left / 4) : 0;
    left -= s.unmanaged;
    for (int i = 0; i < count; ++i) {
        Claim &claim = s.claims[static_cast<std::size_t>(s.count)];
        claim.slot = s.count++;
        claim.leased = upto(left / 2);
        left -= claim.leased;
        claim.static_bytes = random() % 4 == 0 ? upto(left / 3) : 0;
        left -= claim.static_bytes;
        claim.floor = random() % 2 == 0 ? upto((s.capacity - s.unmanaged - promised) / 8) : 0;
        promised += claim.floor;
        claim.limit = random() % 3 == 0 ? claim.floor + upto(s.capacity) : kNoLimit;
        claim.weight = 1 + static_cast<std::uint32_t>(random() % 10);
        claim.priority = static_cast<std::int32_t>(random() % 3) - 1;
        claim.cached = upto(claim.leased);
        claim.mapped_free = upto(claim.leased - claim.cached);
        claim.used = random() % 3 == 0 ? 0 : claim.leased - claim.cached - claim.mapped_free;
        claim.leaving = upto(claim.leased - claim.cached - claim.mapped_free - claim.used);
        claim.active_ns = kNow - upto(2 * kActiveNs);
        if (random() % 3 == 0) {
            claim.demand = random() % 4 == 0 ? 0 : 1 + upto(s.capacity / 4);
            claim.ticket = random() % 1000;
            claim.demand_since_ns = kNow - upto(3 * kAgeingNs);
            claim.demand_seen_ns = kNow - upto(2 * kDemandLifetimeNs);
        }
        if (random() % 8 == 0) claim.ask_open_ns = kNow - upto(2 * kAnswerNs);
    }
    if (random() % 3 == 0) s.unmanaged += upto(s.capacity / 2);  // outsiders have grown
    return s;
}

std::int64_t i64(std::uint64_t value) { return static_cast<std::int64_t>(value); }

void check_grants(const Snapshot &s, int index, std::uint64_t bytes) {
    std::int64_t bound = i64(s.capacity) - i64(s.unmanaged);
    for (int i = 0; i < s.count; ++i) {
        const Claim &claim = s.claims[static_cast<std::size_t>(i)];
        bound -= i64(i == index ? claim.held() : std::max(claim.held(), claim.floor));
    }
    const Claim &own = s.claims[static_cast<std::size_t>(index)];
    const bool in_limit = own.limit == kNoLimit || own.held() + bytes <= own.limit;
    const Verdict verdict = decide(s, index, bytes);
    if (verdict == Verdict::grant) CHECK(i64(bytes) <= bound && in_limit);
    if (verdict == Verdict::limit) CHECK(!in_limit);
    if (verdict == Verdict::capacity) CHECK(in_limit && i64(bytes) > bound);
    if (verdict == Verdict::waiting) CHECK(own.held() + bytes > own.floor);  // never within one's own floor
    CHECK(verdict == decide(s, index, bytes));
}

bool wants_floor(const Claim &claim, std::uint64_t now) {
    return claim.demand_seen_ns != 0 && now <= claim.demand_seen_ns + kDemandLifetimeNs && claim.held() < claim.floor;
}

void check_asks(const Snapshot &s) {
    const Asks a = asks(s);
    std::int64_t need = -i64(s.capacity) + i64(s.unmanaged), excess = need;
    std::int64_t givable = 0;
    int waiting = 0;
    bool silence = false;
    for (int i = 0; i < s.count; ++i) {
        const Claim &claim = s.claims[static_cast<std::size_t>(i)];
        const bool waits = demand_alive(claim, s.now_ns);
        waiting += waits || wants_floor(claim, s.now_ns) ? 1 : 0;
        need += i64(std::max(claim.held() + (waits ? claim.demand : 0), std::max(claim.held(), claim.floor)));
        need -= i64(claim.leaving);
        const std::uint64_t stays = claim.held() - claim.leaving;
        excess += i64(stays);
        const std::uint64_t lent = stays > claim.floor ? stays - claim.floor : 0;
        givable += i64(std::min({claim.cached + claim.mapped_free + claim.used, lent, claim.leased}));
        silence = silence || (claim.ask_open_ns != 0 && s.now_ns > claim.ask_open_ns + kAnswerNs);
    }
    excess = std::max<std::int64_t>(0, excess);
    std::int64_t asked = 0;
    for (int i = 0; i < s.count; ++i) {
        const Claim &claim = s.claims[static_cast<std::size_t>(i)];
        const Ask &ask = a[static_cast<std::size_t>(i)];
        const std::uint64_t sum = ask.mapped_free + ask.cached + ask.as_freed;
        asked += i64(sum);
        CHECK(ask.mapped_free + ask.along <= claim.mapped_free);
        CHECK(ask.cached <= claim.cached);
        CHECK(ask.as_freed <= claim.used);
        CHECK(sum + claim.leaving <= claim.leased);
        CHECK(sum == 0 || claim.held() - claim.leaving - sum - ask.along >= claim.floor);
        const bool alone =
            waiting == 0 || (waiting == 1 && (demand_alive(claim, s.now_ns) || wants_floor(claim, s.now_ns)));
        if (alone) CHECK(i64(sum) <= excess);
        if (claim.ask_open_ns != 0 && s.now_ns > claim.ask_open_ns + kAnswerNs) CHECK_EQ(sum, 0U);
        CHECK_EQ(ask.over_limit, claim.limit < claim.held() ? claim.held() - claim.limit : 0U);
    }
    CHECK(asked <= std::max<std::int64_t>(0, need));
    if (!silence) CHECK(asked >= std::min(excess, givable));  // outsiders' bytes are made room for
    const Asks again = asks(s);
    for (std::size_t i = 0; i < a.size(); ++i) {
        CHECK(a[i].mapped_free == again[i].mapped_free && a[i].cached == again[i].cached &&
              a[i].as_freed == again[i].as_freed);
    }
}

// Whoever ranks first is never refused for the sake of others: somebody can always go on.
void check_progress(const Snapshot &s) {
    int waiting = 0;
    int can_go = 0;
    for (int i = 0; i < s.count; ++i) {
        const Claim &claim = s.claims[static_cast<std::size_t>(i)];
        if (!demand_alive(claim, s.now_ns)) continue;
        const Verdict verdict = decide(s, i, claim.demand);
        if (verdict == Verdict::waiting) ++waiting;
        if (verdict == Verdict::grant) ++can_go;
    }
    if (waiting > 0 && can_go == 0) {
        // Then bytes are being gathered for an older or poorer demand that does not fit yet.
        bool larger = false;
        for (int i = 0; i < s.count; ++i) {
            const Claim &claim = s.claims[static_cast<std::size_t>(i)];
            if (demand_alive(claim, s.now_ns)) larger = larger || decide(s, i, claim.demand) == Verdict::capacity;
        }
        CHECK(larger);
    }
}

}  // namespace

TEST("ledger policy: properties over 10,000 random snapshots") {
    std::mt19937_64 random(42);
    for (int round = 0; round < 10'000; ++round) {
        const Snapshot s = random_snapshot(random);
        check_asks(s);
        check_progress(s);
        const int index = static_cast<int>(random() % static_cast<std::uint64_t>(s.count));
        check_grants(s, index, 1 + random() % (s.capacity / 4));
        const std::uint64_t most = grantable(s, index);
        CHECK(most == 0 || decide(s, index, most) == Verdict::grant);
        CHECK(decide(s, index, most + 1) != Verdict::grant);
        if (most > 1) CHECK(decide(s, index, 1 + random() % most) == Verdict::grant);
    }
}
