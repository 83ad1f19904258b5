// Extents in use are emptied for those who wait, although the engine never stops using blocks.
#include <algorithm>
#include <chrono>
#include <deque>
#include <random>
#include <thread>

#include "pool_fixture.hpp"

using namespace elastickv;

namespace {

constexpr std::uint64_t kPage = 64 * 1024;

// An engine that uses nearly all blocks it can get: each step the oldest ones end and as many begin.
struct Engine {
    World world;
    std::deque<std::uint32_t> used;
    std::vector<std::uint32_t> evicted;

    explicit Engine(const Shape &shape, std::uint32_t blocks) : world(shape) {
        const auto ids = world.alloc(blocks);
        CHECK_EQ(ids.size(), blocks);
        used.assign(ids.begin(), ids.end());
        std::mt19937 random(3);
        std::shuffle(used.begin(), used.end(), random);
    }
    void step(std::size_t count, bool cached = false) {
        const auto gone = world.pool->maintain(false);
        evicted.insert(evicted.end(), gone.begin(), gone.end());
        world.step();
        world.settle();
        count = std::min(count, used.size());
        std::vector<std::uint32_t> ended(used.begin(), used.begin() + static_cast<std::ptrdiff_t>(count));
        used.erase(used.begin(), used.begin() + static_cast<std::ptrdiff_t>(count));
        CHECK_OK(world.pool->release(ended, cached));
        if (cached) count /= 2;  // else the engine itself would take what it has just cached
        while (count-- > 0) {
            const auto one = world.alloc(1);
            if (one.empty()) break;
            used.push_back(one.front());
        }
        CHECK_OK(world.pool->check_integrity());
    }
    std::uint64_t pages() { return world.tenant->leased() / world.page_cost; }
};

// Nothing is asked any more: what is withheld comes back a moment later.
void expect_all_back(Pool &pool) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (pool.stats().withheld != 0) {
        CHECK(std::chrono::steady_clock::now() < until);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        pool.maintain(false);
    }
}

// Four blocks a page, extents of eight pages, and no more than what is held.
Shape busy() {
    Shape shape;
    shape.blocks = 1024;
    shape.block_bytes = kPage / 4;
    shape.max_extent = 8;
    shape.budget_pages = 137;  // block 0's page and 17 extents
    return shape;
}

}  // namespace

TEST("pool: what is asked of pages in use comes, although every free block is taken again") {
    Engine engine(busy(), 512);
    const std::uint64_t before = engine.pages();
    for (int i = 0; i < 40; ++i) engine.step(64);
    CHECK_EQ(engine.pages(), before);
    for (int i = 0; i < 40; ++i) {  // 64 of 512 end in a step: all of them within nine
        const std::uint64_t given = before - engine.pages();
        if (given >= 16) break;
        engine.world.budget->capacity = (before - given) * engine.world.page_cost;
        engine.world.tenant->set_asked({0, 0, 0, (16 - given) * engine.world.page_cost});
        engine.step(64);
        CHECK(i < 12);
    }
    CHECK_EQ(before - engine.pages(), 16U);
    CHECK(engine.evicted.empty());
    engine.world.tenant->set_asked({});
    expect_all_back(*engine.world.pool);
}

TEST("pool: an ask that vanishes between two steps does not let a drain begin anew") {
    Engine engine(busy(), 512);
    const std::uint64_t before = engine.pages();
    // Looked at alternately: asked for 16 pages, asked for nothing. 64 of 512 blocks end in a step.
    for (int i = 0; before - engine.pages() < 16; ++i) {
        const std::uint64_t given = before - engine.pages();
        engine.world.budget->capacity = (before - given) * engine.world.page_cost;
        engine.world.tenant->set_asked({0, 0, 0, i % 2 == 0 ? (16 - given) * engine.world.page_cost : 0});
        engine.step(64);
        CHECK(i < 80);
    }
    engine.world.tenant->set_asked({});
    expect_all_back(*engine.world.pool);
}

TEST("pool: no request that runs is stopped for a neighbour while blocks are withheld") {
    Engine engine(busy(), 540);
    Pool &pool = *engine.world.pool;
    const std::vector<std::uint32_t> ended(engine.used.begin(), engine.used.begin() + 100);
    engine.used.erase(engine.used.begin(), engine.used.begin() + 100);
    engine.world.tenant->set_asked({0, 0, 0, 40 * engine.world.page_cost, 0, false});
    pool.maintain(false);
    CHECK_OK(pool.release(ended, false));
    CHECK(pool.stats().withheld > 0);
    const std::uint32_t free = pool.stats().free;
    CHECK(pool.ensure(free + 1, false) <= free);  // for a new request there is none
    const std::uint32_t wanted = free + pool.stats().withheld;
    CHECK_EQ(pool.ensure(wanted, false, true), wanted);
    CHECK_EQ(pool.stats().withheld, 0U);
    CHECK_OK(pool.check_integrity());
}

TEST("pool: withheld blocks come back when nobody waits any more") {
    Engine engine(busy(), 547);  // all there are
    engine.world.tenant->set_asked({0, 0, 0, 8 * engine.world.page_cost});
    engine.step(0);
    const auto high = *std::max_element(engine.used.begin(), engine.used.end());
    std::erase(engine.used, high);
    CHECK_OK(engine.world.pool->release(std::vector<std::uint32_t>{high}, false));
    CHECK_EQ(engine.world.pool->stats().withheld, 1U);
    CHECK_EQ(engine.world.pool->available(), 0U);
    CHECK(engine.world.alloc(1).empty());
    CHECK(engine.world.pool->attention());
    engine.world.tenant->set_asked({});
    expect_all_back(*engine.world.pool);
    CHECK_EQ(engine.world.alloc(1), (std::vector<std::uint32_t>{high}));
    CHECK_OK(engine.world.pool->check_integrity());
}

TEST("pool: what a drained extent caches is not taken for another request, may be hit again, and is dropped next") {
    Engine engine(busy(), 547);
    Pool &pool = *engine.world.pool;
    engine.world.tenant->set_asked({0, 0, 0, 8 * engine.world.page_cost});
    engine.step(0);
    const auto high = *std::max_element(engine.used.begin(), engine.used.end());
    const std::vector<std::uint32_t> ended{high};
    CHECK_OK(pool.release(ended, true));
    CHECK_EQ(pool.stats().cached, 1U);
    CHECK_EQ(pool.available(), 0U);
    CHECK(engine.world.alloc(1).empty());
    CHECK_OK(pool.check_integrity());
    CHECK_OK(pool.touch(high));
    CHECK_OK(pool.release(ended, true));
    CHECK_EQ(pool.maintain(false), ended);
    CHECK_EQ(pool.stats().cached, 0U);
    CHECK_EQ(pool.stats().withheld, 1U);
    CHECK_OK(pool.check_integrity());
}

TEST("pool: what a drained extent caches is dropped and told, and a lowered limit is reached in use") {
    Engine engine(busy(), 512);
    const std::uint64_t pages = engine.pages() - 24;
    engine.world.tenant->limit = {pages * engine.world.page_cost, 1};
    for (int i = 0; engine.pages() > pages; ++i) {
        engine.step(48, i % 2 != 0);
        CHECK(i < 60);
    }
    CHECK(!engine.evicted.empty());
    expect_all_back(*engine.world.pool);
    CHECK(engine.pages() <= pages);
}

TEST("pool: draining under random work, blocks across extents") {
    Shape shape;
    shape.blocks = 400;
    shape.block_bytes = 24 * 1024;
    shape.max_extent = 4;
    shape.budget_pages = 120;
    World world(shape);
    std::mt19937 random(9);
    std::vector<std::uint32_t> used;
    for (int round = 0; round < 600; ++round) {
        const auto ids = world.alloc(1 + random() % 12);
        used.insert(used.end(), ids.begin(), ids.end());
        std::shuffle(used.begin(), used.end(), random);
        const std::size_t count = random() % (used.size() / 3 + 1);
        CHECK_OK(world.pool->release({used.data() + used.size() - count, count}, random() % 2 != 0));
        used.resize(used.size() - count);
        if (random() % 3 == 0) world.tenant->set_asked({0, 0, 0, random() % 20 * world.page_cost});
        world.pool->maintain(false);
        world.step();
        CHECK_OK(world.pool->check_integrity());
    }
    world.tenant->set_asked({});
    expect_all_back(*world.pool);
    world.settle();
    CHECK_OK(world.pool->check_integrity());
}
