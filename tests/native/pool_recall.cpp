// Extents on their way out that are taken back: by a pool with its ranks, whose fences pass when the test says so.
#include "base/faultpoint.hpp"
#include "pool_fixture.hpp"

using namespace elastickv;

namespace {

// One block, one page, one extent; nothing is unmapped before step().
Shape plain(std::uint32_t ranks) {
    Shape shape;
    shape.block_bytes = shape.page_bytes;
    shape.ranks = ranks;
    shape.idle_us = 0;
    return shape;
}

std::uint64_t unmaps(World &world) {
    std::uint64_t sum = 0;
    for (std::uint32_t r = 0; r < world.shape.ranks; ++r) sum += world.table->rank(r).unmaps.load();
    return sum;
}

std::uint64_t maps(World &world) {
    std::uint64_t sum = 0;
    for (std::uint32_t r = 0; r < world.shape.ranks; ++r) sum += world.table->rank(r).maps.load();
    return sum;
}

// The answers come before the leases: both are back.
void check_leased(World &world, std::uint64_t pages) {
    for (int i = 0; i < 5000 && world.tenant->leased() != pages * world.page_cost; ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK_EQ(world.tenant->leased(), pages * world.page_cost);
    CHECK_EQ(static_cast<std::uint64_t>(world.tenant->mapped.load()), pages * world.page_cost);
    CHECK_OK(world.pool->check_integrity());
}

// Frees `ids`; the idle clock sends their pages on their way.
void send_off(World &world, const std::vector<std::uint32_t> &ids) {
    CHECK_OK(world.pool->release(ids, false));
    world.pool->maintain(true);
    CHECK_EQ(world.pool->stats().pages.leaving, ids.size());
    CHECK_OK(world.pool->check_integrity());
}

// Waits until the rank's mapper has passed the fence and gone on: it has answered what was ordered afterwards.
void pass_fence(World &world, std::uint32_t rank) {
    CHECK_OK(world.ranks[rank]->fence(world.pool->ticket(), 0));
    for (int i = 0; i < 5000 && world.table->rank(rank).fence_passed.load() < world.pool->ticket(); ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK_EQ(world.table->rank(rank).fence_passed.load(), world.pool->ticket());
}

}  // namespace

TEST("pool recall: what waits for its fence stays, with its contents, without a driver call or a lease") {
    Shape shape;  // blocks lie across pages here
    shape.ranks = 2;
    shape.spans = 2;
    shape.max_extent = 4;
    shape.idle_us = 0;
    shape.blocks = 264;
    shape.block_bytes = 16 * 1024;
    World world(shape);
    const auto ids = world.alloc(30);
    CHECK_EQ(ids.size(), 30U);
    for (const std::uint32_t block : ids) world.write_all(block, static_cast<int>(block));
    CHECK_OK(world.pool->release(ids, false));
    world.pool->maintain(true);
    const PoolStats before = world.pool->stats();
    CHECK(before.pages.leaving >= 7);
    const std::uint64_t leased = world.tenant->leased(), mapped = maps(world), unmapped = unmaps(world);

    CHECK(world.alloc(30) == ids);
    for (const std::uint32_t block : ids) world.check_all(block, static_cast<int>(block));
    const PoolStats after = world.pool->stats();
    CHECK_EQ(after.recalled_extents, before.extents - 1);  // all but that of block 0
    CHECK_EQ(after.grown_extents, before.grown_extents);
    CHECK_EQ(after.returned_extents, before.returned_extents);
    CHECK_EQ(after.pages.transit, 0U);
    CHECK_EQ(world.tenant->leased(), leased);
    CHECK_EQ(world.tenant->usage.leaving, 0U);
    CHECK_EQ(maps(world), mapped);
    CHECK_OK(world.pool->check_integrity());

    // The fence of the order that was taken back passes: nothing goes.
    for (std::uint32_t r = 0; r < 2; ++r) pass_fence(world, r);
    CHECK_EQ(world.alloc(20).size(), 20U);  // and the mappers have gone on since
    CHECK_EQ(unmaps(world), unmapped);
    for (const std::uint32_t block : ids) world.check_all(block, static_cast<int>(block));

    // An order that comes later has a fence of its own.
    CHECK_OK(world.pool->release(ids, false));
    world.pool->maintain(true);
    CHECK(world.pool->stats().pages.leaving > 0);
    CHECK_EQ(unmaps(world), unmapped);
    world.step();
    world.settle();
    check_leased(world, world.pool->stats().pages.used + world.pool->stats().pages.free);
    CHECK(unmaps(world) > unmapped);
}

TEST("pool recall: no more stays than is needed, the lowest, and the rest goes") {
    World world(plain(1));
    const auto ids = world.alloc(10);
    send_off(world, ids);
    CHECK(world.alloc(4) == std::vector<std::uint32_t>(ids.begin(), ids.begin() + 4));
    CHECK_EQ(world.pool->stats().recalled_extents, 4U);
    CHECK_EQ(world.pool->stats().pages.leaving, 6U);
    CHECK_EQ(world.pool->headroom_blocks(), 256U - 11U + 6U);  // all that is absent, and what is still going
    world.step();
    world.settle();
    CHECK_EQ(world.pool->stats().returned_extents, 6U);
    check_leased(world, 5);
}

TEST("pool recall: a full device has what is on its way out, and what has gone is mapped anew") {
    Shape shape = plain(2);
    shape.budget_pages = 11;
    World world(shape);
    const auto ids = world.alloc(10);
    send_off(world, ids);
    CHECK_EQ(world.pool->headroom_blocks(), 10U);
    CHECK(world.alloc(10) == ids);
    CHECK_EQ(world.pool->stats().recalled_extents, 10U);
    send_off(world, ids);
    world.step();
    world.settle();
    check_leased(world, 1);
    CHECK(world.alloc(10) == ids);
    CHECK_EQ(world.pool->stats().recalled_extents, 10U);
}

TEST("pool recall: what a neighbour waits for goes") {
    World world(plain(1));
    const auto ids = world.alloc(6);
    send_off(world, ids);
    world.tenant->set_asked({.mapped_free = world.page_cost});
    const auto others = world.alloc(6);
    CHECK_EQ(others.size(), 6U);
    CHECK(others.front() > ids.back());
    CHECK_EQ(world.pool->stats().recalled_extents, 0U);
    CHECK_EQ(world.pool->stats().pages.leaving, 6U);
    CHECK_OK(world.pool->release(others, false));
    world.tenant->set_asked({});  // it has withdrawn
    CHECK_EQ(world.alloc(12).size(), 12U);
    CHECK_EQ(world.pool->stats().recalled_extents, 6U);
    check_leased(world, 13);
}

TEST("pool recall: nothing stays above a limit, and a limit that is raised lets it stay") {
    World world(plain(1));
    const auto ids = world.alloc(10);
    CHECK_OK(world.pool->release(std::vector<std::uint32_t>(ids.begin() + 4, ids.end()), false));
    world.tenant->limit = {8 * world.page_cost, 1, false};
    world.pool->maintain(false);
    CHECK_EQ(world.tenant->held.revision, 1U);
    CHECK_EQ(world.pool->stats().pages.leaving, 3U);
    CHECK(world.alloc(5).empty());
    CHECK_EQ(world.pool->headroom_blocks(), 0U);
    world.tenant->limit = {10 * world.page_cost, 2, false};
    CHECK(world.alloc(5).empty());  // not before the order is answered
    world.pool->maintain(false);
    CHECK_EQ(world.tenant->held.revision, 2U);
    CHECK(world.alloc(6).empty());
    CHECK_EQ(world.alloc(5).size(), 5U);
    CHECK_EQ(world.pool->stats().recalled_extents, 2U);
    world.step();
    world.settle();
    check_leased(world, 10);
}

TEST("pool recall: what was given for a trim goes") {
    World world(plain(1));
    const auto ids = world.alloc(6);
    CHECK_OK(world.pool->release(ids, false));
    world.tenant->trim = {2 * world.page_cost, 1};
    world.pool->maintain(false);
    CHECK_EQ(world.tenant->trimmed.bytes, 2 * world.page_cost);
    CHECK_EQ(world.alloc(6).size(), 6U);
    CHECK_EQ(world.pool->stats().recalled_extents, 0U);
    CHECK_EQ(world.pool->stats().pages.leaving, 2U);
    world.step();
    world.settle();
    check_leased(world, 7);
}

TEST("pool recall: what one of two ranks has let go of is not asked back") {
    World world(plain(2));
    const auto ids = world.alloc(5);
    send_off(world, ids);
    pass_fence(world, 0);
    for (int i = 0; i < 5000 && unmaps(world) < 5; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const auto others = world.alloc(5);
    CHECK_EQ(others.size(), 5U);
    CHECK(others.front() > ids.back());
    CHECK_EQ(unmaps(world), 5U);  // the other rank's work may still be under way
    pass_fence(world, 1);
    world.settle();
    CHECK_EQ(world.pool->stats().recalled_extents, 0U);
    check_leased(world, 6);
}

TEST("pool recall: what one of two ranks does not keep goes everywhere, behind its fence, and each lease goes once") {
    World world(plain(2));
    const auto ids = world.alloc(3);
    send_off(world, ids);
    CHECK(fault::set("memory.recall.begin", fault::Action::fail, 2) == fault::Setting::done);
    CHECK_EQ(world.alloc(3).size(), 3U);
    fault::clear();
    PoolStats stats = world.pool->stats();
    CHECK_EQ(stats.recalled_extents, 2U);
    CHECK_EQ(stats.grown_extents, 5U);  // the one that was missing, elsewhere
    CHECK_EQ(stats.pages.leaving, 1U);
    CHECK_EQ(stats.map_failures, 0U);
    CHECK_EQ(unmaps(world), 0U);
    CHECK_EQ(world.tenant->leased(), 5 * world.page_cost);
    CHECK_OK(world.pool->check_integrity());
    CHECK_EQ(world.alloc(1).size(), 1U);  // it is not asked back a second time
    CHECK_EQ(world.pool->stats().pages.leaving, 1U);
    world.step();
    world.settle();
    CHECK_EQ(world.pool->stats().returned_extents, 1U);
    check_leased(world, 5);
}

TEST("pool recall: a pool that closes in between gives everything back, once") {
    for (const bool whole : {true, false}) {
        World world(plain(2));
        const auto ids = world.alloc(4);
        send_off(world, ids);
        if (!whole) CHECK(fault::set("memory.recall.begin", fault::Action::fail, 3) == fault::Setting::done);
        CHECK_EQ(world.alloc(4).size(), 4U);
        fault::clear();
        world.pool->close();
        world.ranks.clear();
        CHECK_EQ(world.tenant->leased(), 0U);
        CHECK_EQ(world.tenant->mapped.load(), 0);
    }
}
