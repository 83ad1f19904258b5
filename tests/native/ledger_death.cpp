// Processes that die at any instruction, fork, stop, or hold the lock too long.
#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <random>

#include "base/faultpoint.hpp"
#include "ledger/table.hpp"
#include "ledger_support.hpp"

using namespace ledgertest;
namespace lg = elastickv::ledger;

namespace {

std::unique_ptr<lg::Table> table_of(const Directory &directory) {
    LedgerOptions options;
    options.directory = directory.path;
    options.device = "host";
    auto table = lg::Table::open(options);
    CHECK_OK(table);
    return std::move(table).value();
}

// Leases and gives for ever, with everything that may happen on the way.
void work(const Directory &directory, const std::string &name) {
    auto ledger = open(directory, 64 * MiB);
    auto tenant = join(ledger, name, 2 * MiB);
    for (std::uint64_t i = 0;; ++i) {
        const std::uint64_t bytes = (1 + i % 7) * MiB;
        if (tenant->lease(bytes, true).ok()) tenant->give(bytes);
        if (tenant->lease_static(MiB, false).ok()) tenant->give_static(MiB);
        if (i % 16 == 0) (void)tenant->lease(70 * MiB, true);
        if (i % 8 == 0) (void)tenant->ask();
        if (i % 32 == 0) (void)ledger->order_limit(name, (2 + i % 64) * MiB);
        if (i % 32 == 1) (void)ledger->order_limit(name, kNoLimit);
    }
}

}  // namespace

TEST("ledger death: the leases of a killed process are leasable at once") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    Signal ready;
    Child child([&] {
        auto b = join(open(directory, 64 * MiB), "b", 8 * MiB);
        CHECK_OK(b->lease(48 * MiB, false));
        CHECK_OK(b->lease_static(16 * MiB, false));
        b->add_mapped(1 << 20);
        ready.send();
        pause();
    });
    ready.receive();
    CHECK(a->lease(1, false).code() == Code::unavailable);
    CHECK_EQ(row_of(ledger, "b").mapped, MiB);
    const std::uint64_t start = now_ms();
    child.kill();
    while (!a->lease(64 * MiB, true).ok()) {
        CHECK(now_ms() - start < 1000);
        usleep(500);
    }
    const TenantView dead = row_of(ledger, "b");
    CHECK(!dead.alive);
    CHECK_EQ(dead.leased + dead.static_bytes + dead.mapped + dead.floor + dead.demand, 0U);
}

TEST("ledger death: a waiter hears of a death without being told") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    Signal ready;
    Child child([&] {
        auto b = join(open(directory, 64 * MiB), "b");
        CHECK_OK(b->lease(64 * MiB, false));
        ready.send();
        pause();
    });
    ready.receive();
    const std::uint32_t seen = a->freed_word();
    child.kill();
    const std::uint64_t start = now_ms();
    while (a->wait_freed(seen, 100'000) == seen) CHECK(now_ms() - start < 1000);
    CHECK_OK(a->lease(64 * MiB, false));
}

TEST("ledger death: killed at every named point, 20 times over, nothing stays behind") {
    const char *points[] = {"ledger.lease.locked", "ledger.lease.granted", "ledger.lease.demanded",
                            "ledger.give.done",    "ledger.join.locked",   "ledger.join.named",
                            "ledger.join.written", "ledger.limit.ordered", "ledger.bury.cleared"};
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    std::mt19937 random(20240607);
    for (int round = 0; round < 20; ++round) {
        for (const char *point : points) {
            const bool early = std::strstr(point, "join") != nullptr || std::strstr(point, "bury") != nullptr;
            const std::uint64_t after = early ? 0 : random() % 50;
            Child child([&] {
                if (std::strstr(point, "bury") != nullptr) {
                    // The one who buries another dies over it.
                    Child dead([&] {
                        auto tenant = join(open(directory, 64 * MiB), "x");
                        CHECK_OK(tenant->lease(8 * MiB, false));
                        raise(SIGKILL);
                    });
                    (void)dead.wait();
                }
                (void)fault::set(point, fault::Action::kill, after);
                work(directory, "victim");
            });
            CHECK_EQ(child.wait(), 1000 + SIGKILL);
            const std::uint64_t start = now_ms();
            const Status status = a->lease(64 * MiB, false);
            if (!status.ok()) check::fail(__FILE__, __LINE__, std::string(point) + ": " + status.message());
            CHECK(now_ms() - start < 1000);
            a->give(64 * MiB);
            auto again = ledger->join(named("victim"));
            CHECK_OK(again);
        }
    }
    CHECK(table_of(directory)->header().repairs.load() >= 100);  // most of them died with the lock
}

TEST("ledger death: killed at random moments, the sum never exceeds the capacity") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    std::mt19937 random(7);
    for (int round = 0; round < 40; ++round) {
        std::vector<std::unique_ptr<Child>> children;
        for (int i = 0; i < 3; ++i) {
            children.push_back(std::make_unique<Child>([&, i] { work(directory, "w" + std::to_string(i)); }));
        }
        usleep(2000 + random() % 15000);
        for (auto &child : children) {
            auto view = ledger->view();
            CHECK_OK(view);
            std::uint64_t leased = 0;
            for (const TenantView &row : view->tenants) leased += row.leased + row.static_bytes;
            CHECK(leased <= 64 * MiB);
            child->kill();
            CHECK_EQ(child->wait(), 1000 + SIGKILL);
        }
        auto all = join(ledger, "all");
        CHECK_OK(all->lease(64 * MiB, false));
    }
}

TEST("ledger death: a dead rank's mapped bytes go, its tenant stays") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    Signal ready;
    Child rank([&] {
        auto member = open(directory, 64 * MiB)->attach(a->slot(), a->incarnation());
        CHECK_OK(member);
        (*member)->add_mapped(static_cast<std::int64_t>(4 * MiB));
        ready.send();
        pause();
    });
    ready.receive();
    CHECK_EQ(row_of(ledger, "a").mapped, 4 * MiB);
    rank.kill();
    (void)rank.wait();
    CHECK_EQ(row_of(ledger, "a").mapped, 0U);
    CHECK(row_of(ledger, "a").alive);
}

TEST("ledger death: a forked child does not keep its dead parent alive") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    Signal ready;
    Signal done;
    Child parent([&] {
        auto b = join(open(directory, 64 * MiB), "b");
        CHECK_OK(b->lease(32 * MiB, false));
        if (fork() == 0) {  // not a Child: it must outlive its parent
            const Status status = b->lease(MiB, true);
            CHECK(status.code() == Code::denied);
            CHECK_EQ(status.message(), "this tenant belongs to the parent process; a forked child must attach itself");
            b->give(32 * MiB);
            b->give_static(MiB);
            b->add_mapped(5);
            b->publish({}, {});
            b->withdraw_demand();
            CHECK_EQ(b->ask().cached, 0U);
            CHECK_EQ(b->headroom(), 0U);
            CHECK(!b->pressed());
            CHECK_EQ(b->leased(), 32 * MiB);
            b.reset();
            ready.send();
            done.receive();
            _exit(0);
        }
        pause();
    });
    ready.receive();
    CHECK_EQ(row_of(ledger, "b").leased, 32 * MiB);
    parent.kill();
    (void)parent.wait();
    CHECK(!row_of(ledger, "b").alive);
    CHECK_OK(join(ledger, "a")->lease(64 * MiB, false));
    done.send();
}

TEST("ledger death: a forked child may attach itself and then keeps the tenant") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    Signal ready;
    Signal done;
    Signal left;
    Child parent([&] {
        auto mine = open(directory, 64 * MiB);
        auto b = join(mine, "b");
        CHECK_OK(b->lease(32 * MiB, false));
        const int slot = b->slot();
        const std::uint64_t incarnation = b->incarnation();
        const pid_t child = fork();
        if (child == 0) {
            auto member = mine->attach(slot, incarnation);  // through the ledger it inherited
            if (!member.ok()) _exit(1);
            ready.send();
            done.receive();
            member->reset();
            left.send();
            _exit(0);
        }
        pause();
    });
    ready.receive();
    parent.kill();
    (void)parent.wait();
    CHECK(row_of(ledger, "b").alive);
    CHECK_EQ(row_of(ledger, "b").leased, 32 * MiB);
    done.send();
    left.receive();
    CHECK(!row_of(ledger, "b").alive);
}

TEST("ledger death: who holds the lock too long is named") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB, 100);
    auto a = join(ledger, "a");
    Signal held;
    Child holder([&] {
        auto table = table_of(directory);
        auto guard = table->lock("holding on");
        CHECK_OK(guard);
        held.send();
        pause();
    });
    held.receive();
    const std::uint64_t start = now_ms();
    const Status status = a->lease(MiB, true);
    const std::uint64_t took = now_ms() - start;
    CHECK(status.code() == Code::timeout);
    CHECK(took >= 100 && took < 1000);
    CHECK_EQ(status.message(), "leasing: the lock of ledger '" + directory.file("host.ledger") +
                                   "' was not free within 100 ms; taken last by process " +
                                   std::to_string(holder.pid()) + ": is it stopped? Continue it or end it");
    CHECK(ledger->view().status().code() == Code::timeout);
    a->give(MiB);
    CHECK(!a->pressed());
    holder.kill();
    (void)holder.wait();
    CHECK_OK(a->lease(MiB, true));
    CHECK_EQ(table_of(directory)->header().repairs.load(), 1U);
}

TEST("ledger death: waiting for a limit ends when the tenant dies") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    Signal ready;
    Child child([&] {
        auto b = join(open(directory, 64 * MiB), "b");
        ready.send();
        pause();
    });
    ready.receive();
    auto revision = ledger->order_limit("b", 8 * MiB);
    CHECK_OK(revision);
    std::atomic<bool> killed{false};
    const Status status = ledger->wait_limit("b", *revision, 5000, [&] {
        if (!killed.exchange(true)) child.kill();
        return false;
    });
    CHECK(status.code() == Code::not_found);
    CHECK_EQ(status.message(),
             "tenant 'b' does not run, so nobody can acknowledge its limit; the limit is kept and "
             "holds when it starts");
    CHECK_EQ(join(ledger, "b")->limit_wanted().bytes, 8 * MiB);
}

TEST("ledger death: fault points count, fail once, delay") {
    CHECK(!fault::point("files.open"));
    CHECK(fault::set("files.open", fault::Action::fail, 2) == fault::Setting::done);
    CHECK(fault::set("ledger.give.done", fault::Action::delay, 0, 5000) == fault::Setting::done);
    CHECK(fault::set("ledger.give.done", fault::Action::fail, 0) == fault::Setting::cannot_fail);
    CHECK(fault::set("no.such.point", fault::Action::kill, 0) == fault::Setting::unknown);
    CHECK(!fault::point("files.open"));
    CHECK(!fault::point("files.open"));
    CHECK(fault::point("files.open"));
    CHECK(!fault::point("files.open"));
    CHECK_EQ(fault::passes("files.open"), 4U);
    const std::uint64_t start = now_ms();
    CHECK(!fault::point("ledger.give.done"));
    CHECK(now_ms() - start >= 4);
    fault::clear();
    CHECK(!fault::point("files.open"));
    CHECK_EQ(fault::passes("files.open"), 0U);
}
