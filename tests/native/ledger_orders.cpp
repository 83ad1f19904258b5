// What an operator orders: limits that hold now, trims; and what tenants measure.
#include <algorithm>
#include <numeric>
#include <thread>

#include "base/faultpoint.hpp"
#include "ledger_support.hpp"

using namespace ledgertest;

namespace {

Usage usage_of(std::uint64_t used, std::uint64_t cached, std::uint64_t mapped_free) {
    Usage usage;
    usage.used = used;
    usage.cached = cached;
    usage.mapped_free = mapped_free;
    return usage;
}

std::uint64_t samples(const Histogram &histogram) {
    return std::accumulate(histogram.counts.begin(), histogram.counts.end(), std::uint64_t{0});
}

}  // namespace

TEST("ledger orders: a trim is asked of its tenant alone, within what it can give, until it is answered") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a", 4 * MiB);
    auto b = join(ledger, "b");
    CHECK_OK(a->lease(16 * MiB, false));
    a->publish(usage_of(2 * MiB, 10 * MiB, 4 * MiB), {});
    const std::uint32_t bell = a->bell_word(), other = b->bell_word();
    auto revision = ledger->order_trim("a", 6 * MiB);
    CHECK_OK(revision);
    CHECK(a->bell_word() != bell);
    CHECK_EQ(b->bell_word(), other);
    CHECK(a->pressed());
    CHECK(!b->pressed());
    CHECK_EQ(a->ask().trim, 6 * MiB);
    CHECK_EQ(b->ask().trim, 0U);
    CHECK_EQ(row_of(ledger, "a").trim_wanted, 6 * MiB);
    auto larger = ledger->order_trim("a", 40 * MiB);
    CHECK_OK(larger);
    CHECK(*larger > *revision);
    CHECK_EQ(a->ask().trim, 12 * MiB);  // not the floor, not what is used
    CHECK(ledger->wait_trim("a", *revision, 20).status().code() == Code::timeout);
    a->acknowledge_trim({MiB, *larger + 1});  // never ordered: nothing
    CHECK(a->pressed());
    a->acknowledge_trim({MiB, *revision});  // the earlier one; the later stays open
    CHECK_EQ(ledger->wait_trim("a", *revision, 0).value(), MiB);
    CHECK(a->pressed());
    a->acknowledge_trim({11 * MiB, *larger});
    CHECK(!a->pressed());
    CHECK_EQ(ledger->wait_trim("a", *revision, 0).value(), 11 * MiB);
    CHECK_EQ(ledger->wait_trim("a", *larger, 0).value(), 11 * MiB);
    CHECK_EQ(a->ask().trim, 0U);
}

TEST("ledger orders: a trim dies with its tenant and is refused to who does not run") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    CHECK(ledger->order_trim("a", MiB).status().code() == Code::not_found);
    auto a = join(ledger, "a");
    CHECK(ledger->order_trim("a", 0).status().code() == Code::invalid);
    auto revision = ledger->order_trim("a", MiB);
    CHECK_OK(revision);
    std::thread leaver([&] {
        usleep(30'000);
        a.reset();
    });
    const std::uint64_t start = now_ms();
    const Status gone = ledger->wait_trim("a", *revision, 20'000).status();
    leaver.join();
    CHECK(gone.code() == Code::not_found);
    CHECK(now_ms() - start < 10'000);
    CHECK_EQ(ledger->order_trim("a", MiB).status().message(),
             "tenant 'a' does not run, so it has nothing to give back");
    auto again = join(ledger, "a");
    CHECK(!again->pressed());
    CHECK_EQ(again->trim_wanted().revision, again->trim_done().revision);
    CHECK(ledger->wait_trim("a", *revision, 0).status().code() == Code::not_found);
    CHECK(ledger->wait_trim("a", *revision + 100, 0).status().code() == Code::invalid);
}

TEST("ledger orders: a limit that holds now is told from one that does not, dead names keep it") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    CHECK_OK(a->lease(16 * MiB, false));
    CHECK_OK(ledger->order_limit("a", 8 * MiB, true));
    CHECK(a->limit_wanted().now);
    CHECK(a->ask().now);
    CHECK_EQ(a->ask().over_limit, 8 * MiB);
    CHECK(row_of(ledger, "a").limit_now);
    CHECK_OK(ledger->order_limit("a", 12 * MiB));
    CHECK(!a->ask().now);
    CHECK_EQ(a->ask().over_limit, 4 * MiB);
    a.reset();
    CHECK_OK(ledger->order_limit("a", 4 * MiB, true));
    auto again = join(ledger, "a");
    CHECK_EQ(again->limit_held().bytes, 4 * MiB);
    CHECK(!again->pressed());
    CHECK(!again->ask().now);  // it holds nothing above
}

TEST("ledger orders: a limit that is to hold now is not acknowledged by one who holds more") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    CHECK_OK(a->lease(12 * MiB, false));
    CHECK_OK(a->lease_static(4 * MiB, false));
    auto revision = ledger->order_limit("a", 8 * MiB, true);
    CHECK_OK(revision);
    a->give(7 * MiB);
    a->acknowledge_limit(a->limit_wanted());
    CHECK(ledger->wait_limit("a", *revision, 0).code() == Code::timeout);
    a->give(MiB);
    a->acknowledge_limit(a->limit_wanted());
    CHECK_OK(ledger->wait_limit("a", *revision, 0));
}

TEST("ledger orders: a name that was made up goes with its tenant, and its limit with it") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    TenantOptions options = named("engine-1");
    options.lasting = false;
    auto names = [&] { return ledger->view().value().tenants.size(); };
    auto a = join(ledger, options);
    CHECK_OK(ledger->order_limit("engine-1", 8 * MiB));
    CHECK_EQ(names(), 1U);
    a.reset();
    CHECK_EQ(names(), 0U);
    for (const char *where : {"ledger.join.named", "ledger.join.written", "ledger.bury.cleared"}) {
        Child child([&] {
            auto other = open(directory, 64 * MiB);
            CHECK(fault::set(where, fault::Action::kill, 0) == fault::Setting::done);
            join(other, options).reset();
        });
        CHECK_EQ(child.wait(), 1000 + SIGKILL);
        CHECK_EQ(names(), 0U);
    }
    a = join(ledger, options);
    CHECK_EQ(a->limit_wanted().bytes, kNoLimit);
    a.reset();
    a = join(ledger, "engine-1");  // and one that is given stays
    a.reset();
    CHECK_EQ(names(), 1U);
}

TEST("ledger orders: samples of all threads and processes are counted, by bucket, for one life") {
    Directory directory;
    auto ledger = open(directory, 64 * MiB);
    auto a = join(ledger, "a");
    const int slot = a->slot();
    const std::uint64_t incarnation = a->incarnation();
    Child rank([&] {
        auto member = open(directory, 64 * MiB)->attach(slot, incarnation);
        CHECK_OK(member);
        for (int i = 0; i < 1000; ++i) (*member)->observe(Latency::map, 15'000);
        (*member)->publish_static_used(3 * MiB);
        _exit(0);  // as if killed: what it said of its own goes, what it measured stays
    });
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t)
        threads.emplace_back([&] {
            for (int i = 0; i < 1000; ++i) a->observe(Latency::unmap, 1'000'001'000);
        });
    for (auto &thread : threads) thread.join();
    CHECK_EQ(rank.wait(), 0);
    a->publish_static_used(MiB);
    TenantView row = row_of(ledger, "a");
    const Histogram &map = row.histograms[static_cast<std::size_t>(Latency::map)];
    const Histogram &unmap = row.histograms[static_cast<std::size_t>(Latency::unmap)];
    CHECK_EQ(samples(map), 1000U);
    CHECK_EQ(map.counts[1], 1000U);  // above 10 us, up to 20
    CHECK_EQ(map.sum_ns, 15'000'000U);
    CHECK_EQ(unmap.counts.back(), 3000U);
    CHECK_EQ(samples(row.histograms[static_cast<std::size_t>(Latency::lease_wait)]), 0U);
    CHECK_EQ(row.static_used, MiB);
    for (std::size_t i = 0; i < kLatencyBoundsUs.size(); ++i) {
        a->observe(Latency::lease_wait, kLatencyBoundsUs[i] * 1000);
        CHECK_EQ(row_of(ledger, "a").histograms[0].counts[i], 1U);  // a bound belongs to its bucket
    }
    a.reset();
    a = join(ledger, "a");
    row = row_of(ledger, "a");
    for (const Histogram &one : row.histograms) CHECK_EQ(samples(one) + one.sum_ns, 0U);
    CHECK_EQ(row.static_used, 0U);
}
