// One process: joining, leasing, giving, floors, limits, bells.
#include <thread>

#include "ledger_support.hpp"

using namespace ledgertest;

TEST("ledger: a tenant leases up to the capacity and no further") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    auto b = join(ledger, "b");
    CHECK_OK(a->lease(40 * MiB, false));
    const Status refused = b->lease(32 * MiB, false);
    CHECK_EQ(code_name(refused.code()), std::string("unavailable"));
    CHECK_EQ(refused.message(),
             "no 32 MiB more for tenant 'b': of 64 MiB on device 'host' tenants hold 40 MiB, floors of others keep "
             "0 bytes, others use 0 bytes; ask again later");
    CHECK_OK(b->lease(24 * MiB, false));
    CHECK_EQ(a->leased() + b->leased(), 64 * MiB);
    CHECK(b->lease(1, false).code() == Code::unavailable);
    a->give(8 * MiB);
    CHECK_OK(b->lease_static(8 * MiB, false));
    CHECK_EQ(row_of(ledger, "b").static_bytes, 8 * MiB);
    b->give_static(100 * MiB);
    CHECK_EQ(b->static_bytes(), 0U);
    CHECK(a->lease(~std::uint64_t{0}, true).code() == Code::unavailable);
    CHECK(a->lease(~std::uint64_t{0} - 40 * MiB, true).code() == Code::unavailable);
}

TEST("ledger: a floor is kept free for its owner") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    auto b = join(ledger, "b", 16 * MiB);
    CHECK_EQ(a->headroom(), 48 * MiB);
    CHECK(a->lease(49 * MiB, false).code() == Code::unavailable);
    CHECK_OK(a->lease(48 * MiB, false));
    CHECK_OK(b->lease(16 * MiB, false));
    auto third = ledger->join(named("c", 49 * MiB));
    CHECK_EQ(third.status().message(),
             "tenant 'c': the floor of 49 MiB is above what others leave of device 'host': 48 MiB of 64 MiB, after "
             "their floors and static bytes (16 MiB); lower the floor or stop one of: a, b");
    CHECK(third.status().code() == Code::invalid);
}

TEST("ledger: leaving frees the leases, the name and the limit stay") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    TenantOptions options = named("a");
    options.set_limit = true;
    options.limit = 32 * MiB;
    auto a = join(ledger, options);
    CHECK_OK(a->lease(32 * MiB, false));
    const Status above = a->lease(1 * MiB, true);
    CHECK(above.code() == Code::limit);
    CHECK_EQ(above.message(),
             "no 1 MiB more for tenant 'a': it holds 32 MiB and its limit is 32 MiB; raise the limit or free some");
    const std::uint64_t first = a->incarnation();
    a.reset();
    const TenantView gone = row_of(ledger, "a");
    CHECK(!gone.alive);
    CHECK_EQ(gone.leased, 0U);
    CHECK_EQ(gone.limit_wanted, 32 * MiB);
    auto again = join(ledger, "a");
    CHECK(again->incarnation() != first);
    CHECK_EQ(again->limit_wanted().bytes, 32 * MiB);
    CHECK_EQ(again->limit_held().bytes, 32 * MiB);
    CHECK(again->lease(33 * MiB, false).code() == Code::limit);
    CHECK(ledger->join(named("a")).status().code() == Code::exists);
    CHECK(ledger->forget("a").code() == Code::exists);
    again.reset();
    CHECK_OK(ledger->forget("a"));
    CHECK(ledger->forget("a").code() == Code::not_found);
    CHECK_EQ(join(ledger, "a")->limit_wanted().bytes, kNoLimit);
}

TEST("ledger: a refusal with ring records the demand and rings the neighbours") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    auto b = join(ledger, "b");
    CHECK_OK(a->lease(64 * MiB, false));
    const std::uint32_t bell = a->bell_word();
    CHECK(b->lease(8 * MiB, false).code() == Code::unavailable);
    CHECK_EQ(a->bell_word(), bell);
    CHECK(!a->pressed());
    CHECK_EQ(row_of(ledger, "b").demand, 0U);
    CHECK(b->lease(8 * MiB, true).code() == Code::unavailable);
    CHECK(a->bell_word() != bell);
    CHECK(a->pressed());
    CHECK(!b->pressed());
    CHECK_EQ(row_of(ledger, "b").demand, 8 * MiB);
    Usage usage;
    usage.mapped_free = 4 * MiB;
    usage.cached = 40 * MiB;
    usage.used = 20 * MiB;
    a->publish(usage, {});
    const Ask ask = a->ask();
    CHECK_EQ(ask.mapped_free, 4 * MiB);
    CHECK_EQ(ask.cached, 4 * MiB);
    const std::uint32_t freed = b->freed_word();
    a->give(8 * MiB);
    CHECK(b->freed_word() != freed);
    CHECK_EQ(a->ask().cached, 0U);
    CHECK_OK(b->lease(8 * MiB, true));
    CHECK_EQ(row_of(ledger, "b").demand, 0U);
    CHECK(!a->pressed());
}

TEST("ledger: what waits behind a refused lease stands beside the demand, and goes with it") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    auto b = join(ledger, "b");
    CHECK_OK(a->lease(64 * MiB, false));
    Usage usage;
    usage.used = 64 * MiB;
    a->publish(usage, {});
    b->set_backlog(16 * MiB);
    CHECK(!a->pressed());  // nothing was refused yet
    CHECK(b->lease(8 * MiB, true).code() == Code::unavailable);
    CHECK_EQ(row_of(ledger, "b").backlog, 16 * MiB);
    CHECK_EQ(a->ask().as_freed, 24 * MiB);
    b->set_backlog(1'000'000 * MiB);
    CHECK(b->lease(8 * MiB, true).code() == Code::unavailable);
    CHECK_EQ(a->ask().as_freed, 32 * MiB);  // half is its share
    CHECK(b->lease_static(8 * MiB, true).code() == Code::unavailable);
    CHECK_EQ(row_of(ledger, "b").backlog, 0U);  // of blocks, not of weights
    CHECK(b->lease(8 * MiB, true).code() == Code::unavailable);
    b->withdraw_demand();
    CHECK_EQ(row_of(ledger, "b").demand + row_of(ledger, "b").backlog, 0U);
    CHECK(!a->pressed());
}

TEST("ledger: neighbours go on giving for a floor of which a part was granted") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    CHECK_OK(a->lease(64 * MiB, false));
    auto b = join(ledger, "b", 32 * MiB);
    CHECK(b->lease(8 * MiB, true).code() == Code::unavailable);
    Usage usage;
    usage.used = 64 * MiB;
    a->publish(usage, {});
    a->give(8 * MiB);
    CHECK_OK(b->lease(8 * MiB, true));
    CHECK_EQ(row_of(ledger, "b").demand, 0U);
    CHECK(a->pressed());
    CHECK_EQ(a->ask().as_freed, 24 * MiB);
    a->give(24 * MiB);
    CHECK_OK(b->lease(24 * MiB, true));
    CHECK(!a->pressed());
}

TEST("ledger: a demand expires by itself") {
    Directory directory;
    auto ledger = open(directory, 8 * MiB);
    auto a = join(ledger, "a");
    auto b = join(ledger, "b");
    CHECK_OK(a->lease(8 * MiB, false));
    CHECK(b->lease(8 * MiB, true).code() == Code::unavailable);
    a->give(8 * MiB);
    CHECK(a->lease(8 * MiB, false).code() == Code::unavailable);  // b comes first
    const std::uint64_t ticket = row_of(ledger, "b").demand_ticket;
    CHECK(b->lease(9 * MiB, true).code() == Code::unavailable);
    CHECK_EQ(row_of(ledger, "b").demand_ticket, ticket);  // refreshed, not a new one
    usleep(120'000);
    CHECK_EQ(row_of(ledger, "b").demand, 0U);
    CHECK(!a->pressed());
    CHECK_OK(a->lease(8 * MiB, false));
    CHECK(b->lease(8 * MiB, true).code() == Code::unavailable);
    CHECK(row_of(ledger, "b").demand_ticket > ticket);
    b->withdraw_demand();
    CHECK(!a->pressed());
}

TEST("ledger: members keep a tenant alive") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    auto rank = ledger->attach(a->slot(), a->incarnation());
    CHECK_OK(rank);
    CHECK_OK(a->lease(16 * MiB, false));
    (*rank)->add_mapped(static_cast<std::int64_t>(4 * MiB));
    a->add_mapped(static_cast<std::int64_t>(2 * MiB));
    CHECK_EQ(row_of(ledger, "a").mapped, 6 * MiB);
    const int slot = a->slot();
    const std::uint64_t incarnation = a->incarnation();
    a.reset();
    CHECK(row_of(ledger, "a").alive);
    CHECK_EQ(row_of(ledger, "a").leased, 16 * MiB);
    CHECK_EQ(row_of(ledger, "a").mapped, 4 * MiB);
    (*rank)->add_mapped(-static_cast<std::int64_t>(64 * MiB));
    CHECK_EQ(row_of(ledger, "a").mapped, 0U);
    rank->reset();
    CHECK(!row_of(ledger, "a").alive);
    const Status late = ledger->attach(slot, incarnation).status();
    CHECK(late.code() == Code::not_found);
    CHECK(ledger->attach(-1, 1).status().code() == Code::invalid);
}

TEST("ledger: a full table says so, and gives up names of the dead first") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    join(ledger, "old").reset();
    std::vector<std::unique_ptr<Tenant>> tenants;
    for (int i = 0; i < kMaxTenants; ++i) tenants.push_back(join(ledger, "t" + std::to_string(i)));
    const Status full = ledger->join(named("more")).status();
    CHECK(full.code() == Code::exists);
    CHECK_EQ(full.message(),
             "all 64 places on device 'host' are taken by tenants that run; stop one before starting 'more'");
    CHECK_EQ(rows_of(ledger).size(), static_cast<std::size_t>(kMaxTenants));
    const int seventh = tenants[7]->slot();
    tenants[7].reset();
    usleep(1000);
    tenants[3].reset();
    auto more = join(ledger, "more");
    CHECK_EQ(more->slot(), seventh);  // the name that was left longest ago
}

TEST("ledger: members are counted too") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    std::vector<std::unique_ptr<Tenant>> members;
    for (int i = 1; i < kMaxMembers; ++i) {
        auto member = ledger->attach(a->slot(), a->incarnation());
        CHECK_OK(member);
        members.push_back(std::move(member).value());
    }
    CHECK_EQ(ledger->attach(a->slot(), a->incarnation()).status().message(),
             "tenant 'a' has all of its 64 member processes already");
}

TEST("ledger: limits are ordered, in force at once, acknowledged") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a", 8 * MiB);
    CHECK_OK(a->lease(40 * MiB, false));
    const Status low = ledger->order_limit("a", 4 * MiB).status();
    CHECK(low.code() == Code::invalid);
    CHECK_EQ(low.message(),
             "tenant 'a': a limit of 4 MiB is under its floor of 8 MiB; give a larger one, or restart "
             "it with a lower floor");
    const std::uint32_t bell = a->bell_word();
    auto revision = ledger->order_limit("a", 32 * MiB);
    CHECK_OK(revision);
    CHECK(a->bell_word() != bell);
    CHECK(a->pressed());
    CHECK(a->lease(1, false).code() == Code::limit);
    CHECK_EQ(a->ask().over_limit, 8 * MiB);
    CHECK_EQ(a->limit_held().bytes, kNoLimit);
    const std::uint64_t start = now_ms();
    const Status late = ledger->wait_limit("a", *revision, 50);
    CHECK(late.code() == Code::timeout);
    CHECK(now_ms() - start >= 50 && now_ms() - start < 1000);
    CHECK_EQ(late.message(), "tenant 'a' did not acknowledge revision " + std::to_string(*revision) +
                                 " of its limit within 50 ms; it holds revision 0 (no limit). No new lease goes above "
                                 "the new limit; is the engine stuck?");
    a->acknowledge_limit({32 * MiB, *revision + 1});  // never ordered: nothing
    CHECK_EQ(a->limit_held().bytes, kNoLimit);
    std::thread answer([&] {
        usleep(20'000);
        a->acknowledge_limit(a->limit_wanted());
    });
    const Status held = ledger->wait_limit("a", *revision, 2000);
    answer.join();
    CHECK_OK(held);
    CHECK(!a->pressed());
    CHECK(ledger->wait_limit("a", *revision + 5, 10).code() == Code::invalid);
    CHECK_EQ(ledger->order_limit("b", 1).status().message(), "no tenant named 'b' on device 'host'; there are: a");
    a.reset();
    auto kept = ledger->order_limit("a", 16 * MiB);
    CHECK_OK(kept);
    CHECK(ledger->wait_limit("a", *kept, 10).code() == Code::not_found);
    auto restarted = ledger->join(named("a", 17 * MiB));
    CHECK_EQ(restarted.status().message(),
             "tenant 'a': the floor of 17 MiB is above its limit of 16 MiB, which the ledger keeps from before; lower "
             "the floor or raise the limit");
    auto small = join(ledger, "a", 8 * MiB);
    CHECK_OK(ledger->wait_limit("a", *kept, 10));
    CHECK_EQ(small->headroom(), 16 * MiB);
}

TEST("ledger: a bell wakes a sleeper within milliseconds") {
    Directory directory;
    auto ledger = open(directory, 8 * MiB);
    auto a = join(ledger, "a");
    auto b = join(ledger, "b");
    CHECK_OK(a->lease(8 * MiB, false));
    std::vector<std::uint64_t> latencies;
    for (int round = 0; round < 50; ++round) {
        std::uint64_t woken = 0;
        const std::uint32_t seen = a->bell_word();
        std::thread sleeper([&] {
            const std::uint32_t word = a->wait_bell(seen, 2'000'000);
            woken = word == seen ? ~std::uint64_t{0} : now_ms();
        });
        usleep(2000);
        const std::uint64_t rung = now_ms();
        CHECK(b->lease(MiB, true).code() == Code::unavailable);
        sleeper.join();
        CHECK(woken != ~std::uint64_t{0});
        latencies.push_back(woken - rung);
    }
    std::sort(latencies.begin(), latencies.end());
    CHECK(latencies[25] <= 5);
    CHECK(latencies.back() <= 500);
    const std::uint32_t seen = b->bell_word();
    b->ring_self();
    CHECK(b->wait_bell(seen, 2'000'000) != seen);
    const std::uint64_t start = now_ms();
    CHECK_EQ(b->wait_bell(b->bell_word(), 20'000), b->bell_word());
    CHECK(now_ms() - start >= 19);
}

TEST("ledger: names and figures are checked") {
    Directory directory;
    auto ledger = open(directory, 8 * MiB);
    CHECK_EQ(ledger->join(named("a b")).status().message(), "'a b' is no tenant name: 1 to 63 of A-Z a-z 0-9 . _ -");
    CHECK(ledger->join(named("")).status().code() == Code::invalid);
    CHECK(ledger->join(named(std::string(64, 'a'))).status().code() == Code::invalid);
    CHECK_OK(ledger->join(named(std::string(63, 'a'))));
    TenantOptions heavy = named("w");
    heavy.weight = 1001;
    CHECK_EQ(ledger->join(heavy).status().message(), "tenant 'w': weight 1001 is outside 1 to 1000");
    TenantOptions odd = named("l", 4 * MiB);
    odd.set_limit = true;
    odd.limit = 2 * MiB;
    CHECK_EQ(ledger->join(odd).status().message(),
             "tenant 'l': the floor of 4 MiB is above its limit of 2 MiB; lower "
             "the floor or raise the limit");
    TenantOptions full = named("full");
    full.priority = -3;
    full.weight = 7;
    full.engine = std::string(200, 'e');
    full.layout = "block-outermost";
    full.page_bytes = 65536;
    auto tenant = join(ledger, full);
    const TenantView row = row_of(ledger, "full");
    CHECK_EQ(row.priority, -3);
    CHECK_EQ(row.weight, 7U);
    CHECK_EQ(row.engine, std::string(63, 'e'));
    CHECK_EQ(row.layout, "block-outermost");
    CHECK_EQ(row.page_bytes, 65536U);
    CHECK_EQ(row.pid, static_cast<std::int64_t>(getpid()));
}

TEST("ledger: memory of others narrows what can be leased") {
    Directory directory;
    auto ledger = open(directory, 8 * MiB);
    auto a = join(ledger, "a");
    CHECK_OK(ledger->set_unmanaged(6 * MiB));
    CHECK(a->lease(3 * MiB, false).code() == Code::unavailable);
    CHECK_OK(a->lease(2 * MiB, false));
    CHECK_OK(ledger->set_unmanaged(0));
    CHECK_EQ(a->headroom(), 6 * MiB);
    CHECK_EQ(ledger->view().value().unmanaged, 0U);
    CHECK(ledger->set_unmanaged(~std::uint64_t{0}).code() == Code::invalid);
}

TEST("ledger: outsiders who grow past the capacity ring those who can give") {
    Directory directory;
    auto ledger = open(directory, 8 * MiB);
    auto a = join(ledger, "a");
    auto b = join(ledger, "b");
    CHECK_OK(a->lease(4 * MiB, false));
    CHECK_OK(b->lease(2 * MiB, false));
    Usage usage;
    usage.cached = 4 * MiB;
    a->publish(usage, {});
    usage.cached = 0;
    usage.used = 2 * MiB;
    b->publish(usage, {});
    const std::uint32_t bell_a = a->bell_word(), bell_b = b->bell_word();
    CHECK_OK(ledger->set_unmanaged(2 * MiB));
    CHECK(!a->pressed());
    CHECK_EQ(a->bell_word(), bell_a);
    CHECK_OK(ledger->set_unmanaged(5 * MiB));
    CHECK(a->bell_word() != bell_a);
    CHECK_EQ(b->bell_word(), bell_b);  // it has nothing to give
    CHECK_EQ(a->ask().cached, 3 * MiB);
    CHECK_EQ(b->ask().cached + b->ask().mapped_free, 0U);
    for (int i = 0; i < 1000 && !a->pressed(); ++i) usleep(5'000);
    CHECK(a->pressed());
    a->give(3 * MiB);
    for (int i = 0; i < 1000 && a->pressed(); ++i) usleep(5'000);
    CHECK(!a->pressed());
    CHECK_EQ(a->ask().cached, 0U);
}

TEST("ledger: asks are counted, and so is who answers late") {
    Directory directory;
    auto ledger = open(directory, 8 * MiB);
    auto a = join(ledger, "a");
    auto b = join(ledger, "b");
    auto c = join(ledger, "c");
    CHECK_OK(a->lease(4 * MiB, false));
    CHECK_OK(c->lease(4 * MiB, false));
    Usage usage;
    usage.cached = 4 * MiB;
    a->publish(usage, {.misses = 3, .evicted_need = 4});
    CHECK(b->lease(MiB, true).code() == Code::unavailable);
    CHECK(b->lease(MiB, true).code() == Code::unavailable);
    TenantView row = row_of(ledger, "a");
    CHECK_EQ(row.counters.asked, 1U);  // one ask stands open, however often it is repeated
    CHECK_EQ(row.counters.misses + row.counters.evicted(), 7U);
    CHECK_EQ(row_of(ledger, "c").counters.asked, 0U);
    CHECK_EQ(a->ask().cached, MiB);
    a->answered();
    a->answered();
    CHECK_EQ(row_of(ledger, "a").counters.answered, 1U);
    CHECK(b->lease(MiB, true).code() == Code::unavailable);
    usleep(550'000);
    c->publish(usage, {});
    CHECK(b->lease(MiB, true).code() == Code::unavailable);  // a is silent now: c is asked instead
    CHECK_EQ(c->ask().cached, MiB);
    CHECK_EQ(a->ask().cached, MiB);  // what it hears when it comes back
    row = row_of(ledger, "a");
    CHECK_EQ(row.counters.asked, 2U);
    CHECK_EQ(row.counters.late, 1U);
    a->answered();
    row = row_of(ledger, "a");
    CHECK_EQ(row.counters.answered, 2U);
    CHECK_EQ(row.counters.late, 1U);
}
