// What the pool does for the operator's orders: limits, limits that hold now, trims; and what it measures of waits.
#include <algorithm>
#include <chrono>

#include "base/faultpoint.hpp"
#include "ledger_support.hpp"
#include "pool_fixture.hpp"

using namespace elastickv;

namespace {

Shape one_block_a_page() {
    Shape shape;
    shape.block_bytes = shape.page_bytes;
    return shape;
}

std::uint64_t pages_of(const World &world) { return world.tenant->leased() / world.page_cost; }

std::vector<std::uint32_t> part(const std::vector<std::uint32_t> &ids, std::size_t from, std::size_t to) {
    return {ids.begin() + static_cast<std::ptrdiff_t>(from), ids.begin() + static_cast<std::ptrdiff_t>(to)};
}

}  // namespace

TEST("pool orders: a trim takes free pages, then cached ones, leaves the floor, and says what it gives") {
    World world(one_block_a_page());
    const auto ids = world.alloc(12);  // 13 pages with block 0
    CHECK_OK(world.pool->release(part(ids, 0, 4), true));
    CHECK_OK(world.pool->release(part(ids, 4, 7), false));
    world.tenant->trim = {2 * world.page_cost, 1};
    CHECK(world.pool->attention());
    CHECK(world.pool->maintain(false).empty());
    CHECK_EQ(world.tenant->trimmed.revision, 1U);
    CHECK_EQ(world.tenant->trimmed.bytes, 2 * world.page_cost);
    CHECK(!world.pool->attention());
    world.tenant->trim = {3 * world.page_cost - 5, 2};  // whole pages
    CHECK_EQ(world.pool->maintain(false), part(ids, 0, 2));
    CHECK_EQ(world.tenant->trimmed.bytes, 3 * world.page_cost);
    world.step();
    world.settle();
    CHECK_EQ(pages_of(world), 8U);
    world.tenant->floor_bytes = 7 * world.page_cost;
    world.tenant->trim = {100 * world.page_cost, 3};
    CHECK_EQ(world.pool->maintain(true).size(), 1U);
    CHECK_EQ(world.tenant->trimmed.bytes, world.page_cost);
    world.tenant->floor_bytes = 0;
    world.tenant->trim = {100 * world.page_cost, 4};
    CHECK_EQ(world.pool->maintain(true).size(), 1U);
    world.tenant->trim = {100 * world.page_cost, 5};
    CHECK(world.pool->maintain(true).empty());  // what is left is used
    CHECK_EQ(world.tenant->trimmed.bytes, 0U);
    CHECK_EQ(world.tenant->trimmed.revision, 5U);
    CHECK_EQ(world.tenant->counters.evicted_limit, 4U);
    CHECK_EQ(world.tenant->counters.evicted(), 4U);
    CHECK_EQ(world.pool->used(), 5U);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool orders: a limit now is acknowledged once the last page is back, by whoever looks") {
    World world(one_block_a_page());
    const auto ids = world.alloc(9);  // 10 pages
    CHECK_OK(world.pool->release(part(ids, 0, 2), true));
    CHECK_OK(world.pool->release(part(ids, 2, 3), false));
    world.tenant->limit = {4 * world.page_cost, 1, true};
    CHECK_EQ(world.pool->preempt_blocks(), 3U);  // 6 above, 3 of them free or cached
    CHECK_EQ(world.pool->maintain(false).size(), 2U);
    CHECK_EQ(world.pool->preempt_blocks(), 3U);  // what is leaving does not count twice
    CHECK_EQ(world.tenant->held.revision, 0U);
    world.step();
    world.settle();
    CHECK_EQ(pages_of(world), 7U);
    CHECK_EQ(world.tenant->held.revision, 0U);
    CHECK(world.pool->next_deadline_us(true) <= 10'000);  // somebody looks again soon
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    CHECK(world.pool->attention());
    CHECK_OK(world.pool->release(part(ids, 3, 6), true));  // three requests are preempted
    CHECK_EQ(world.pool->preempt_blocks(), 0U);
    CHECK_EQ(world.pool->maintain(false).size(), 3U);
    CHECK_EQ(world.tenant->held.revision, 0U);  // its fence has not passed: the pages are still there
    world.step();
    for (int i = 0; i < 5000 && world.tenant->held.revision == 0; ++i) {
        world.pool->poll();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK_EQ(world.tenant->held.revision, 1U);
    CHECK_EQ(pages_of(world), 4U);
    CHECK(!world.pool->attention());
    CHECK_EQ(world.tenant->counters.evicted_limit, 5U);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool orders: a limit now under what block 0 and static bytes hold is never said to hold") {
    World world(one_block_a_page());
    world.tenant->fixed = 2 * world.page_cost;
    const auto ids = world.alloc(3);
    world.tenant->limit = {2 * world.page_cost, 1, true};
    CHECK_EQ(world.pool->preempt_blocks(), 3U);
    CHECK_OK(world.pool->release(ids, false));
    world.pool->maintain(true);
    world.step();
    world.settle();
    CHECK_EQ(pages_of(world), 1U);
    CHECK_EQ(world.pool->preempt_blocks(), 0U);  // nothing left to preempt
    world.pool->maintain(true);
    CHECK_EQ(world.tenant->held.revision, 0U);
    world.tenant->limit = {3 * world.page_cost, 2, true};
    world.pool->poll();
    CHECK_EQ(world.tenant->held.revision, 2U);
}

TEST("pool orders: a plain limit is acknowledged at once, and what requests free above it goes back") {
    World world(one_block_a_page());
    const auto ids = world.alloc(9);
    world.tenant->limit = {5 * world.page_cost, 1};
    CHECK(world.pool->maintain(false).empty());
    CHECK_EQ(world.tenant->held.revision, 1U);
    CHECK_EQ(world.pool->preempt_blocks(), 0U);
    CHECK(!world.pool->attention());  // all of it is used: nothing to do
    CHECK_OK(world.pool->release(part(ids, 0, 3), true));
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    CHECK(world.pool->attention());
    CHECK_EQ(world.pool->maintain(false).size(), 3U);
    CHECK_OK(world.pool->release(part(ids, 3, 6), false));
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    CHECK_EQ(world.alloc(2).size(), 0U);  // two of the three free pages go before they are used again
    CHECK_EQ(world.alloc(1).size(), 1U);
    world.step();
    world.settle();
    CHECK_EQ(pages_of(world), 5U);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool orders: each device answers its own orders") {
    ledgertest::Directory first, second;
    auto one = ledgertest::open(first, 64 * ledgertest::MiB), two = ledgertest::open(second, 64 * ledgertest::MiB);
    std::shared_ptr<Tenant> a = ledgertest::join(one, "a"), b = ledgertest::join(two, "a");
    constexpr std::uint64_t page = 64 * 1024;
    auto driver = make_host_driver({page, 0});
    CHECK_OK(driver);
    auto table = PageTable::create(64, 2, 7);
    CHECK_OK(table);
    PoolOptions options;
    options.num_blocks = 64;
    options.block_bytes = options.page_bytes = page;
    options.stock_pages = 0;
    auto pool = Pool::make(*table, {{a, page}, {b, 2 * page}}, options);
    CHECK_OK(pool);
    std::vector<std::unique_ptr<Rank>> ranks;
    const std::vector<std::shared_ptr<Tenant>> tenants{a, b};
    for (std::uint32_t r = 0; r < 2; ++r) {
        auto tenant = tenants[r];
        RankHooks hooks{
            [tenant](std::int64_t bytes) { tenant->add_mapped(bytes); },
            [tenant](std::uint64_t bytes) { tenant->give(bytes); },
            [tenant](bool mapped, std::uint64_t ns) { tenant->observe(mapped ? Latency::map : Latency::unmap, ns); }};
        auto rank = Rank::attach(*driver, *table, {r, r + 1, 64 * page, page}, hooks);
        CHECK_OK(rank);
        ranks.push_back(std::move(rank).value());
    }
    CHECK_OK((*pool)->wait_ready(5000));
    std::vector<std::uint32_t> ids(9);
    std::uint32_t evicted = 0;
    CHECK((*pool)->alloc(ids, &evicted));
    CHECK_OK((*pool)->release(part(ids, 0, 6), true));
    auto trim = two->order_trim("a", 3 * page);  // two of its pages
    CHECK_OK(trim);
    CHECK_OK(one->order_limit("a", 7 * page, true));
    CHECK((*pool)->attention());
    CHECK_EQ((*pool)->maintain(false).size(), 5U);
    CHECK_EQ(two->wait_trim("a", *trim, 0).value(), 4 * page);
    CHECK_EQ(b->limit_held().revision, b->limit_wanted().revision);
    CHECK(a->limit_held().revision != a->limit_wanted().revision);
    for (auto &rank : ranks) CHECK_OK(rank->fence((*pool)->ticket(), 0));
    for (int i = 0; i < 5000 && a->limit_held().revision != a->limit_wanted().revision; ++i) {
        (*pool)->poll();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK_EQ(a->limit_held().bytes, 7 * page);
    CHECK_EQ(a->leased(), 5 * page);
    CHECK_EQ(ledgertest::row_of(one, "a").counters.evicted_limit, 5U);
    const auto map = ledgertest::row_of(two, "a").histograms[static_cast<std::size_t>(Latency::map)];
    CHECK(std::count(map.counts.begin(), map.counts.end(), 0U) < static_cast<std::ptrdiff_t>(map.counts.size()));
    CHECK(map.sum_ns > 0);
}

TEST("pool orders: waits for the neighbours are measured, granted or not") {
    Shape shape = one_block_a_page();
    shape.budget_pages = 10;
    World world(shape);
    auto &samples = world.tenant->samples[static_cast<std::size_t>(Latency::lease_wait)];
    CHECK_EQ(world.alloc(9).size(), 9U);
    CHECK_EQ(samples.load(), 0U);
    CHECK_EQ(world.pool->ensure(1), 0U);
    CHECK_EQ(samples.load(), 1U);  // a patient call: its own wait
    const auto waited = world.tenant->sample_ns[0].load();
    CHECK(waited >= 500'000 && waited <= 60'000'000'000);
    CHECK_EQ(world.pool->ensure(1, false), 0U);
    CHECK_EQ(world.pool->ensure(1, false), 0U);
    CHECK_EQ(samples.load(), 1U);  // it goes on
    world.budget->capacity += world.page_cost;
    CHECK_EQ(world.pool->ensure(1, false), 1U);
    CHECK_EQ(samples.load(), 2U);
    CHECK_EQ(world.alloc(1).size(), 1U);
    CHECK_EQ(world.pool->ensure(1, false), 0U);
    std::this_thread::sleep_for(std::chrono::milliseconds(120));
    CHECK_EQ(world.pool->ensure(0, false), 0U);  // nobody asked again: the wait ended with its last refusal
    CHECK_EQ(samples.load(), 3U);
    CHECK_EQ(world.tenant->samples[static_cast<std::size_t>(Latency::map)].load(), 0U);  // the fixture has no hook
}

TEST("pool orders: where every address is in use no neighbour is waited for") {
    Shape shape = one_block_a_page();
    shape.blocks = 10;
    shape.wait_us = 1'000'000;
    World world(shape);
    const auto ids = world.alloc(9);
    CHECK_EQ(ids.size(), 9U);
    const auto start = monotonic_ns();
    CHECK_EQ(world.pool->ensure(1), 0U);
    CHECK(monotonic_ns() - start < 900'000'000);
    CHECK_EQ(world.tenant->samples[static_cast<std::size_t>(Latency::lease_wait)].load(), 0U);
    CHECK_OK(world.pool->release(ids, false));
    CHECK_EQ(world.pool->ensure(9), 9U);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool orders: a lease on its way back is no broken book, and one that is missing is") {
    World world(one_block_a_page());
    const auto ids = world.alloc(1);
    CHECK_OK(world.pool->release(ids, false));
    CHECK(fault::set("memory.unmap.answered", fault::Action::delay, 0, 2'000'000) == fault::Setting::done);
    (void)world.pool->give_all();
    world.step();
    bool seen = false;  // answered, and the lease not back: the rank is between the two
    for (int i = 0; i < 20'000 && !seen; ++i) {
        futex_ring(world.table->header().answer_bell);  // as another rank does that has just answered
        CHECK_OK(world.pool->check_integrity());
        seen = world.pool->stats().pages.transit == 0 && pages_of(world) != 1;
        std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    CHECK(seen);
    CHECK_OK(world.pool->check_integrity());
    fault::clear();
    for (int i = 0; i < 5000 && pages_of(world) != 1; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK_EQ(pages_of(world), 1U);
    CHECK_OK(world.pool->check_integrity());
    CHECK_OK(world.tenant->lease(world.page_cost, false));  // held by nobody
    bool found = false;
    for (int i = 0; i < 5000 && !found; ++i) {  // the rank may be about to say that its lease is back
        found = world.pool->check_integrity().code() == Code::integrity;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(found);
    world.tenant->give(world.page_cost);
    CHECK_OK(world.pool->check_integrity());
}
