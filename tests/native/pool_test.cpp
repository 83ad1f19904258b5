// The pool alone: what it hands out is mapped, what it gives back is empty, and its sums hold.
#include <algorithm>
#include <chrono>
#include <map>
#include <random>

#include "pool_fixture.hpp"

using namespace elastickv;

TEST("bitmap: first, last, neighbours against a model") {
    std::mt19937 random(1);
    for (const std::uint64_t size : {1, 63, 64, 65, 4096, 4097, 300000}) {
        Bitmap set(size);
        std::map<std::uint64_t, bool> model;
        for (int i = 0; i < 3000; ++i) {
            const std::uint64_t at = random() % size;
            if (random() % 2) {
                CHECK_EQ(set.insert(at), model.emplace(at, true).second);
            } else {
                CHECK_EQ(set.erase(at), model.erase(at) == 1);
            }
            const std::uint64_t probe = random() % size;
            const auto up = model.lower_bound(probe);
            CHECK_EQ(set.first_from(probe), up == model.end() ? Bitmap::npos : up->first);
            CHECK_EQ(set.last_before(probe), up == model.begin() ? Bitmap::npos : std::prev(up)->first);
            CHECK_EQ(set.count(), model.size());
            CHECK_EQ(set.first(), model.empty() ? Bitmap::npos : model.begin()->first);
            CHECK_EQ(set.last(), model.empty() ? Bitmap::npos : model.rbegin()->first);
        }
    }
}

TEST("pool: lowest blocks first, mapped, zero, and never block 0") {
    World world({});
    const auto ids = world.alloc(20);
    for (std::uint32_t i = 0; i < 20; ++i) {
        CHECK_EQ(ids[i], i + 1);
        world.check_all(ids[i], 0);
        world.write_all(ids[i], 9);
    }
    CHECK_OK(world.pool->release(ids, false));
    CHECK_EQ(world.alloc(1)[0], 1U);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: blocks that straddle pages keep both pages, in several spans and ranks") {
    Shape shape;
    shape.block_bytes = 40 * 1024;  // 64 KiB pages: most blocks lie on two
    shape.blocks = 128;
    shape.spans = 3;
    shape.ranks = 2;
    shape.page_bytes = 64 * 1024;
    World world(shape);
    auto ids = world.alloc(9);
    for (const auto id : ids) world.write_all(id, static_cast<int>(id));
    const std::vector<std::uint32_t> some{ids[1], ids[3], ids[5]};
    CHECK_OK(world.pool->release(some, false));
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    world.pool->maintain(true);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    world.pool->maintain(true);
    world.step();
    world.settle();
    for (const auto id : ids)
        if (std::find(some.begin(), some.end(), id) == some.end()) world.check_all(id, static_cast<int>(id));
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: running out is an answer, and what a neighbour frees is found") {
    Shape shape;
    shape.budget_pages = 10;
    shape.block_bytes = shape.page_bytes;
    World world(shape);
    CHECK_EQ(world.alloc(9).size(), 9U);
    CHECK(world.alloc(1).empty());
    CHECK(world.tenant->rings > 0);
    CHECK_EQ(world.pool->ensure(5), 0U);
    CHECK_OK(world.pool->check_integrity());
    world.budget->capacity += world.page_cost;
    CHECK_EQ(world.alloc(1).size(), 1U);
}

TEST("pool: grows before it evicts, evicts the oldest before it says none") {
    Shape shape;
    shape.budget_pages = 10;
    shape.block_bytes = shape.page_bytes;
    World world(shape);
    const auto first = world.alloc(4);
    CHECK_OK(world.pool->release(first, true));
    CHECK_EQ(world.alloc(3), (std::vector<std::uint32_t>{5, 6, 7}));  // four cached ones were left alone
    CHECK_EQ(world.pool->ensure(4), 6U);
    std::vector<std::uint32_t> ids(4);
    auto evicted = world.pool->take(ids);
    CHECK_OK(evicted);
    CHECK_EQ(*evicted, 2U);
    CHECK_EQ(ids, (std::vector<std::uint32_t>{8, 9, 1, 2}));
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: what neither the room nor the own cache covers alone comes from both") {
    Shape shape;
    shape.budget_pages = 10;
    shape.block_bytes = shape.page_bytes;
    World world(shape);
    const auto first = world.alloc(4);
    CHECK_OK(world.pool->release(first, true));
    CHECK_EQ(world.alloc(8).size(), 8U);  // five new ones and three cached ones
    CHECK(world.alloc(2).empty());
    CHECK_EQ(world.alloc(1), (std::vector<std::uint32_t>{4}));
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: nothing is unmapped before its fence") {
    Shape shape;
    shape.block_bytes = shape.page_bytes;
    World world(shape);
    const auto ids = world.alloc(8);
    for (const auto id : ids) world.write_all(id, 5);
    CHECK_OK(world.pool->release(ids, false));
    world.pool->maintain(true);
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    CHECK(world.pool->maintain(true).empty());
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    CHECK_EQ(world.pool->stats().pages.transit, 8U);
    for (const auto id : ids) world.check_all(id, 5);  // still readable: work in flight may read it
    world.tenant->set_asked({.mapped_free = 1});       // a neighbour waits: they are not taken back
    CHECK_EQ(world.alloc(3).front(), 9U);              // and out of reach for new owners
    world.step();
    world.settle();
    CHECK_EQ(world.tenant->leased(), 4 * world.page_cost);
    CHECK_EQ(static_cast<std::uint64_t>(world.tenant->mapped.load()), world.tenant->leased());
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: pressure takes free pages first, then the least recently used extents, never used ones") {
    Shape shape;
    shape.block_bytes = shape.page_bytes;
    World world(shape);
    const auto a = world.alloc(4), b = world.alloc(4), c = world.alloc(4);
    CHECK_OK(world.pool->release(a, true));
    CHECK_OK(world.pool->release(c, false));
    world.tenant->set_asked({4 * world.page_cost, 2 * world.page_cost, 0, 0});
    CHECK(world.pool->attention());
    const auto evicted = world.pool->maintain(false);
    CHECK_EQ(evicted, (std::vector<std::uint32_t>{a[0], a[1]}));
    world.step();
    world.settle();
    CHECK_EQ(world.tenant->leased(), (1 + 2 + 4) * world.page_cost);
    CHECK_EQ(world.pool->used(), 4U);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: free pages go along with those that are asked, cached and used ones do not") {
    Shape shape;
    shape.block_bytes = shape.page_bytes;
    World world(shape);
    const auto all = world.alloc(20);
    CHECK_OK(world.pool->release({all.begin() + 8, all.end()}, false));
    CHECK_OK(world.pool->release({all.begin() + 4, all.begin() + 8}, true));
    const auto left = [&world](std::uint64_t free, std::uint64_t along) {
        world.tenant->set_asked({.mapped_free = free * world.page_cost, .along = along * world.page_cost + 1});
        CHECK(world.pool->maintain(false).empty());
        world.step();
        world.settle();
        return world.tenant->leased() / world.page_cost;
    };
    CHECK_EQ(left(2, 5), 1 + 20 - 7U);
    CHECK_EQ(left(2, 50), 1 + 8U);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: a lowered limit is held and acknowledged") {
    Shape shape;
    shape.block_bytes = shape.page_bytes;
    World world(shape);
    const auto a = world.alloc(10);
    const std::vector<std::uint32_t> half(a.begin(), a.begin() + 5);
    CHECK_OK(world.pool->release(half, true));
    world.tenant->limit = {7 * world.page_cost, 1};
    CHECK_EQ(world.pool->maintain(false).size(), 4U);
    CHECK_EQ(world.tenant->held.revision, 1U);
    world.step();
    world.settle();
    CHECK_EQ(world.tenant->leased(), 7 * world.page_cost);
    CHECK(world.alloc(3).empty());
    CHECK_EQ(world.alloc(1).size(), 1U);  // its own cached block
}

TEST("pool: idle release goes down to the floor; the cache stays until cache_release") {
    Shape shape;
    shape.block_bytes = shape.page_bytes;
    shape.idle_us = 10'000;
    shape.cache_us = 60'000;
    World world(shape);
    world.tenant->floor_bytes = 3 * world.page_cost;
    const auto a = world.alloc(12);
    const std::vector<std::uint32_t> front(a.begin(), a.begin() + 6), back(a.begin() + 6, a.end());
    CHECK_OK(world.pool->release(front, true));
    CHECK_OK(world.pool->release(back, false));
    CHECK(world.pool->maintain(true).empty());
    CHECK(world.pool->next_deadline_us(true) <= 10'000);
    std::this_thread::sleep_for(std::chrono::milliseconds(15));
    CHECK(world.pool->maintain(true).empty());
    world.step();
    world.settle();
    CHECK_EQ(world.tenant->leased(), 7 * world.page_cost);
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    CHECK_EQ(world.pool->next_deadline_us(true), 0U);
    CHECK_EQ(world.pool->maintain(true).size(), 4U);
    world.step();
    world.settle();
    CHECK_EQ(world.tenant->leased(), 3 * world.page_cost);
    CHECK(world.pool->next_deadline_us(true) > 100'000);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: extents grow with what is held and never past a sixteenth") {
    Shape shape;
    shape.blocks = 2000;
    shape.page_bytes = 4096;
    shape.block_bytes = 4096;
    shape.max_extent = 32;
    World world(shape);
    std::uint64_t before = 0;
    for (int i = 0; i < 19; ++i) {
        const auto held = world.tenant->leased() / world.page_cost;
        CHECK_EQ(world.alloc(100).size(), 100U);
        const auto grown = world.tenant->leased() / world.page_cost - held;
        CHECK(grown <= 100 + std::max<std::uint64_t>(1, (held + 100) / 16));
        before = world.pool->stats().grown_extents;
    }
    CHECK(before < 160);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: what was asked for at once lies in few extents, and the last page of the budget can be had") {
    Shape shape;
    shape.blocks = 2000;
    shape.page_bytes = 4096;
    shape.block_bytes = 4096;
    shape.max_extent = 32;
    shape.budget_pages = 1000;
    World world(shape);
    CHECK_EQ(world.alloc(900).size(), 900U);
    CHECK(world.pool->stats().extents <= 1 + 29 + 1);
    const auto left = 1000 - world.tenant->leased() / world.page_cost;
    CHECK(left > 32);
    CHECK_EQ(world.alloc(static_cast<std::uint32_t>(left + world.pool->available())).size(), 1000U - 901U);
    CHECK_EQ(world.tenant->leased() / world.page_cost, 1000U);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: what waits behind the next blocks is told in bytes, and never more than there is") {
    Shape shape;
    shape.spans = 2;
    World world(shape);
    world.pool->set_backlog(8);  // 192 KiB of 64 KiB pages
    CHECK_EQ(world.tenant->backlog, 3 * world.page_cost);
    world.pool->set_backlog(~std::uint64_t{0});
    CHECK_EQ(world.tenant->backlog, 96 * world.page_cost);
    world.pool->set_backlog(0);
    CHECK_EQ(world.tenant->backlog, 0U);
}

TEST("pool: the stock is mapped ahead, and not under pressure") {
    Shape shape;
    shape.block_bytes = shape.page_bytes;
    shape.stock_pages = 6;
    World world(shape);
    CHECK_EQ(world.alloc(2).size(), 2U);
    world.pool->ensure(0);
    world.settle();
    world.pool->ensure(0);
    world.settle();
    CHECK_EQ(world.pool->stats().pages.free, 6U);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: a driver that fails any call leaks nothing and answers none now") {
    for (const auto call : {Call::create, Call::map, Call::set_access}) {
        for (std::uint64_t n = 1; n <= 12; ++n) {
            Shape shape;
            shape.block_bytes = shape.page_bytes;
            shape.spans = 3;
            auto host = make_host_driver({shape.page_bytes, 0});
            CHECK_OK(host);
            auto faulty = std::make_shared<FaultyDriver>(std::move(host).value());
            shape.driver = faulty;
            World world(shape);
            faulty->fail(call, 6 + n, {Code::out_of_memory, "injected"});
            for (int i = 0; i < 4; ++i) {
                const auto ids = world.alloc(2);
                if (!ids.empty()) CHECK_OK(world.pool->release(ids, true));
            }
            world.settle();
            CHECK_OK(world.pool->check_integrity());
            CHECK_EQ(static_cast<std::uint64_t>(world.tenant->mapped.load()), world.tenant->leased());
        }
    }
}

TEST("pool: wrong ids are refused and change nothing") {
    World world({});
    const auto ids = world.alloc(3);
    const std::vector<std::uint32_t> twice{ids[0], ids[1], ids[0]}, null{ids[0], 0}, beyond{ids[0], 9999};
    CHECK(!world.pool->release(twice, false).ok());
    CHECK(!world.pool->release(null, false).ok());
    CHECK(!world.pool->release(beyond, true).ok());
    CHECK(!world.pool->touch(ids[0]).ok());
    CHECK_EQ(world.pool->used(), 3U);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: random work by two threads, every promise checked") {
    Shape shape;
    shape.blocks = 400;
    shape.block_bytes = 12 * 1024;
    shape.page_bytes = 16 * 1024;
    shape.max_extent = 8;
    shape.ranks = 2;
    shape.budget_pages = 120;
    shape.stock_pages = 3;
    shape.idle_us = 2'000;
    shape.wait_us = 200;
    World world(shape);
    std::atomic<bool> stop{false};
    std::thread steward([&] {
        std::mt19937 random(2);
        while (!stop) {
            world.tenant->set_asked({random() % 8 * world.page_cost, random() % 8 * world.page_cost, 0, 0});
            world.pool->maintain(random() % 2 != 0);
            for (auto &rank : world.ranks)
                if (!rank->fence(world.pool->ticket(), 0).ok()) std::abort();
            std::this_thread::sleep_for(std::chrono::microseconds(300));
        }
    });
    std::mt19937 random(3);
    std::vector<std::uint32_t> live;
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(2);
    while (std::chrono::steady_clock::now() < until) {
        const auto ids = world.alloc(1 + static_cast<std::uint32_t>(random() % 12));
        for (const auto id : ids) world.write_all(id, static_cast<int>(id % 100 + 1));
        live.insert(live.end(), ids.begin(), ids.end());
        std::shuffle(live.begin(), live.end(), random);
        const std::size_t n = live.size() * (random() % 100) / 100;
        for (std::size_t i = 0; i < n; ++i) world.check_all(live[i], static_cast<int>(live[i] % 100 + 1));
        const std::vector<std::uint32_t> gone(live.begin(), live.begin() + static_cast<std::ptrdiff_t>(n));
        live.erase(live.begin(), live.begin() + static_cast<std::ptrdiff_t>(n));
        CHECK_OK(world.pool->release(gone, random() % 2 != 0));
        if (random() % 16 == 0) CHECK_OK(world.pool->check_integrity());
        CHECK(world.budget->leased.load() <= world.budget->capacity);
    }
    stop = true;
    steward.join();
    world.step();
    world.settle();
    CHECK_OK(world.pool->check_integrity());
}
