// Processes that compete: the sum, the last page, members of one tenant that come and go.
#include <sys/mman.h>

#include <atomic>
#include <new>
#include <random>
#include <thread>

#include "base/faultpoint.hpp"
#include "ledger_support.hpp"

using namespace ledgertest;

namespace {

// Memory that forked children share with the test, outside of the ledger.
struct Shared {
    std::atomic<std::uint64_t> held{0}, over{0}, rounds{0};
    std::atomic<std::uint64_t> wins[4] = {};
    std::atomic<bool> go{false};
};
struct SharedBox {
    Shared *at;
    SharedBox() {
        void *mapped = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) check::fail(__FILE__, __LINE__, "mmap failed");
        at = new (mapped) Shared;
    }
    ~SharedBox() { munmap(at, sizeof(Shared)); }
    SharedBox(const SharedBox &) = delete;
    SharedBox &operator=(const SharedBox &) = delete;
    Shared *operator->() const { return at; }
};

}  // namespace

TEST("ledger race: two processes, 10,000 leases, never above the capacity") {
    Directory directory;
    auto ledger = open(directory, 16 * MiB);
    SharedBox shared;
    const auto compete = [&](unsigned seed) {
        auto tenant = join(open(directory, 16 * MiB), "p" + std::to_string(seed));
        std::mt19937 random(seed);
        // Widens the gap between the decision and the deed: without the lock the other would get into it.
        fault::set("ledger.lease.decided", fault::Action::delay, 4000, 30);
        std::uint64_t granted = 0;
        while (granted < 5000) {
            const std::uint64_t bytes = (1 + random() % 12) * MiB;
            if (!tenant->lease(bytes, true).ok()) {
                (void)tenant->wait_freed(tenant->freed_word(), 100);
                continue;
            }
            ++granted;
            if (shared->held.fetch_add(bytes) + bytes > 16 * MiB) shared->over.fetch_add(1);
            if (random() % 8 == 0) sched_yield();
            shared->held.fetch_sub(bytes);
            tenant->give(bytes);
        }
        shared->rounds.fetch_add(granted);
    };
    Child one([&] { compete(1); });
    Child two([&] { compete(2); });
    const std::uint64_t start = now_ms();
    while (shared->rounds.load() < 10000 && now_ms() - start < 60000) {
        std::uint64_t leased = 0;
        for (const TenantView &row : rows_of(ledger)) leased += row.leased;
        CHECK(leased <= 16 * MiB);
        usleep(3000);
    }
    CHECK_EQ(one.wait(), 0);
    CHECK_EQ(two.wait(), 0);
    CHECK_EQ(shared->over.load(), 0U);
    CHECK_EQ(shared->rounds.load(), 10000U);
    for (const TenantView &row : rows_of(ledger)) CHECK_EQ(row.leased, 0U);
}

TEST("ledger race: two equals fight for one page, 10,000 rounds, each wins 30 % at least") {
    Directory directory;
    auto ledger = open(directory, MiB);
    SharedBox shared;
    const auto fight = [&](std::size_t who) {
        auto tenant = join(open(directory, MiB), "p" + std::to_string(who));
        while (!shared->go.load()) usleep(100);
        while (shared->rounds.load() < 10000) {
            const std::uint32_t seen = tenant->freed_word();
            if (tenant->lease(MiB, true).ok()) {
                shared->rounds.fetch_add(1);
                shared->wins[who].fetch_add(1);
                usleep(20);  // long enough for the other to ask; without it one runs alone while the other sleeps
                tenant->give(MiB);
            } else {
                (void)tenant->wait_freed(seen, 2000);
            }
        }
    };
    Child one([&] { fight(0); });
    Child two([&] { fight(1); });
    while (rows_of(ledger).size() < 2) usleep(1000);
    shared->go.store(true);
    CHECK_EQ(one.wait(), 0);
    CHECK_EQ(two.wait(), 0);
    CHECK_EQ(shared->wins[0].load() >= 3000 && shared->wins[1].load() >= 3000
                 ? "fair"
                 : std::to_string(shared->wins[0].load()) + " : " + std::to_string(shared->wins[1].load()),
             "fair");
}

TEST("ledger race: threads of one tenant while it leaves") {
    Directory directory;
    auto ledger = open(directory, 16 * MiB);
    for (int round = 0; round < 20; ++round) {
        auto tenant = join(ledger, "a");
        std::atomic<bool> stop{false};
        std::vector<std::thread> threads;
        for (int i = 0; i < 3; ++i) {
            threads.emplace_back([&] {
                while (!stop.load()) {
                    if (tenant->lease(MiB, true).ok()) tenant->give(MiB);
                    tenant->add_mapped(4096);
                    tenant->add_mapped(-4096);
                    tenant->publish({}, {});
                    (void)tenant->pressed();
                    (void)tenant->ask();
                    tenant->acknowledge_limit(tenant->limit_wanted());
                }
            });
        }
        usleep(3000);
        (void)ledger->order_limit("a", 12 * MiB);
        tenant->leave();
        CHECK(!row_of(ledger, "a").alive);
        CHECK_EQ(row_of(ledger, "a").leased, 0U);
        usleep(500);
        auto next = join(ledger, "b");
        CHECK_OK(next->lease(16 * MiB, false));
        stop.store(true);
        for (auto &thread : threads) thread.join();
        CHECK_EQ(next->leased(), 16 * MiB);
        CHECK(tenant->lease(MiB, false).code() == Code::denied);
    }
}
