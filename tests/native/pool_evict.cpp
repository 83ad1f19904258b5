// Which cached blocks go when memory is asked back: those that keep the most memory mapped for the least content.
#include <algorithm>
#include <random>
#include <set>

#include "pool_fixture.hpp"

using namespace elastickv;

namespace {

constexpr std::uint64_t kPage = 64 * 1024;

// Four blocks a page; 512 of them asked for at once lie in extents of eight pages, behind the page of block 0.
Shape quarters() {
    Shape shape;
    shape.blocks = 1024;
    shape.block_bytes = kPage / 4;
    shape.max_extent = 8;
    return shape;
}

// The position among the 512 of the first block of an extent.
std::size_t at(std::size_t extent) { return 3 + 32 * extent; }

std::vector<std::uint32_t> part(const std::vector<std::uint32_t> &ids, std::size_t from, std::size_t count) {
    return {ids.begin() + static_cast<std::ptrdiff_t>(from), ids.begin() + static_cast<std::ptrdiff_t>(from + count)};
}

std::vector<std::uint32_t> asked(World &world, std::uint64_t pages) {
    world.tenant->set_asked({0, pages * world.page_cost, 0, 0});
    auto evicted = world.pool->maintain(false);
    world.step();
    world.settle();
    CHECK_OK(world.pool->check_integrity());
    return evicted;
}

}  // namespace

TEST("pool: one cached block that keeps an extent goes before an older, full one") {
    World world(quarters());
    const auto ids = world.alloc(512);
    CHECK_OK(world.pool->release(part(ids, at(0), 64), true));  // two full extents, the oldest
    CHECK_OK(world.pool->release(part(ids, at(2), 31), false));
    CHECK_OK(world.pool->release(part(ids, at(3) - 1, 1), true));  // alone on its extent, the newest
    const auto held = world.tenant->leased();
    CHECK_EQ(asked(world, 1), part(ids, at(3) - 1, 1));
    CHECK_EQ(world.tenant->leased(), held - 8 * world.page_cost);
    CHECK_EQ(asked(world, 1), part(ids, at(0), 32));  // of two full ones, the older
}

TEST("pool: the thinner an extent the sooner it goes, and age decides between equals") {
    World world(quarters());
    const auto ids = world.alloc(512);
    const auto keep = [&](std::size_t extent, std::size_t cached) {
        CHECK_OK(world.pool->release(part(ids, at(extent), cached), true));
        CHECK_OK(world.pool->release(part(ids, at(extent) + cached, 32 - cached), false));
    };
    keep(0, 32);
    keep(1, 20);
    keep(2, 10);  // a quarter
    keep(3, 2);   // a sixteenth
    keep(4, 3);   // too, and newer
    keep(5, 1);   // a thirty-second
    for (const std::size_t extent : {5U, 3U, 4U, 2U, 0U, 1U}) {
        const auto evicted = asked(world, 1);
        CHECK(!evicted.empty());
        CHECK_EQ(evicted.front(), ids[at(extent)]);
    }
    CHECK(asked(world, 1).empty());
}

TEST("pool: an extent that loses cached blocks is sorted anew; one with a used block stays") {
    World world(quarters());
    const auto ids = world.alloc(512);
    CHECK_OK(world.pool->release(part(ids, at(0), 95), true));  // of the third extent one block stays in use
    CHECK_OK(world.pool->uncache(part(ids, at(1) + 1, 31)));
    CHECK_OK(world.pool->check_integrity());
    CHECK_EQ(asked(world, 1), part(ids, at(1), 1));
    CHECK_OK(world.pool->touch(ids[at(0)]));
    CHECK(asked(world, 100).empty());  // both others hold a used block
    CHECK_OK(world.pool->release(part(ids, at(0), 1), true));
    CHECK_EQ(asked(world, 100).size(), 32U);
}

TEST("pool: a block that lies on several extents is dropped once, and all of them go") {
    Shape shape;
    shape.block_bytes = 4 * kPage;
    shape.blocks = 64;
    World world(shape);
    const auto ids = world.alloc(6);
    CHECK_OK(world.pool->release(part(ids, 0, 3), true));
    const auto held = world.tenant->leased();
    CHECK_EQ(asked(world, 4), (std::vector<std::uint32_t>{ids[0]}));
    CHECK_EQ(world.tenant->leased(), held - 4 * world.page_cost);
    CHECK_EQ(asked(world, 5).size(), 2U);
    CHECK_EQ(world.pool->used(), 3U);
}

TEST("pool: a lowered limit empties thin extents first too, and the floor is kept otherwise") {
    World world(quarters());
    const auto ids = world.alloc(512);
    CHECK_OK(world.pool->release(part(ids, at(0), 64), true));
    CHECK_OK(world.pool->release(part(ids, at(2), 31), false));
    CHECK_OK(world.pool->release(part(ids, at(3) - 1, 1), true));
    world.tenant->limit = {world.tenant->leased() - 8 * world.page_cost, 1};
    CHECK_EQ(world.pool->maintain(false), part(ids, at(3) - 1, 1));
    world.step();
    world.settle();
    world.tenant->floor_bytes = world.tenant->leased() - 7 * world.page_cost;
    CHECK(asked(world, 100).empty());  // an extent of eight pages would go below it
    world.tenant->floor_bytes -= world.page_cost;
    CHECK_EQ(asked(world, 100).size(), 32U);
    CHECK(asked(world, 100).empty());
}

TEST("pool: eviction by extent against a model, blocks across pages, random work") {
    std::mt19937 random(5);
    Shape shape;
    shape.blocks = 600;
    shape.block_bytes = 24 * 1024;
    shape.max_extent = 4;
    shape.budget_pages = 180;
    World world(shape);
    std::vector<std::uint32_t> used;
    std::set<std::uint32_t> cached;
    for (int round = 0; round < 400; ++round) {
        std::vector<std::uint32_t> ids(1 + random() % 20);
        std::uint32_t evicted = 0;
        if (random() % 2 != 0 && world.pool->alloc(ids, &evicted)) {
            for (std::size_t i = ids.size() - evicted; i < ids.size(); ++i) CHECK_EQ(cached.erase(ids[i]), 1U);
            used.insert(used.end(), ids.begin(), ids.end());
        }
        std::shuffle(used.begin(), used.end(), random);
        const std::size_t count = random() % (used.size() / 4 + 1);
        const bool keep = random() % 4 != 0;
        const std::vector<std::uint32_t> gone(used.end() - static_cast<std::ptrdiff_t>(count), used.end());
        used.resize(used.size() - count);
        CHECK_OK(world.pool->release(gone, keep));
        if (keep) cached.insert(gone.begin(), gone.end());
        if (random() % 3 == 0)
            for (const std::uint32_t id : asked(world, 1 + random() % 12)) CHECK_EQ(cached.erase(id), 1U);
        CHECK_EQ(world.pool->stats().cached, cached.size());
        CHECK_EQ(world.pool->used(), used.size());
    }
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: the cache's own budget holds after each look, oldest first, and what is in use does not count") {
    Shape shape;
    shape.block_bytes = kPage;
    shape.cache_limit = 5;
    World world(shape);
    const auto ids = world.alloc(20);
    CHECK_OK(world.pool->release(part(ids, 0, 5), true));
    CHECK(!world.pool->attention());
    CHECK_OK(world.pool->release(part(ids, 5, 3), true));
    CHECK(world.pool->attention());
    CHECK_EQ(world.pool->next_deadline_us(true), 0U);
    const auto held = world.tenant->leased();
    CHECK_EQ(world.pool->maintain(false), part(ids, 0, 3));
    CHECK_EQ(world.tenant->leased(), held);  // mapped and free
    CHECK_EQ(world.pool->stats().pages.cached, 5U);
    CHECK_EQ(world.pool->stats().counters.evicted_budget, 3U);
    CHECK(!world.pool->attention());
    CHECK_OK(world.pool->touch(ids[4]));
    CHECK_OK(world.pool->release(part(ids, 8, 1), true));
    CHECK(world.pool->maintain(true).empty());
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool: a budget of nothing caches nothing beyond use, also beside used blocks") {
    Shape shape = quarters();
    shape.cache_limit = 0;
    World world(shape);
    const auto ids = world.alloc(60);
    CHECK_OK(world.pool->release(part(ids, 10, 30), true));
    CHECK_EQ(world.pool->maintain(false).size(), 30U);
    CHECK_EQ(world.pool->stats().cached, 0U);
    CHECK_EQ(world.pool->used(), 30U);
    CHECK(!world.pool->attention());
    CHECK_OK(world.pool->check_integrity());
}
