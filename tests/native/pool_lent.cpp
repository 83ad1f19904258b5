// Blocks in the hands of an engine that keeps its own list of free blocks and its own prefixes (lent.cpp).
#include <algorithm>
#include <deque>
#include <map>
#include <random>

#include "pool_fixture.hpp"

using namespace elastickv;

namespace {

using Ids = std::vector<std::uint32_t>;

constexpr std::uint64_t kPage = 64 * 1024;

// Four blocks a page, extents of one page: block 0's page has blocks 1 to 3 as well.
Shape four_a_page() {
    Shape shape;
    shape.block_bytes = kPage / 4;
    return shape;
}

std::uint64_t pages_of(const World &world) { return world.tenant->leased() / world.page_cost; }

Ids span_of(std::uint32_t first, std::uint32_t last) {
    Ids ids;
    for (std::uint32_t id = first; id <= last; ++id) ids.push_back(id);
    return ids;
}

Pool::Reclaimed reclaimed(World &world, const Ids &free, bool idle = false, bool last = true) {
    auto made = world.pool->reclaim(free, idle, last);
    CHECK_OK(made);
    CHECK_OK(world.pool->check_integrity());
    return std::move(made).value();
}

// Takes what the engine is to have, and says what of it is free and cached.
Ids lent_world(World &world, std::uint32_t blocks, std::uint32_t free, std::uint32_t cached) {
    Ids ids = world.alloc(blocks);
    CHECK_EQ(ids, span_of(1, blocks));
    world.pool->lend(free, cached);
    return ids;
}

}  // namespace

TEST("pool lent: neighbours see what the engine says is free and cached, and no more than it has") {
    World world(four_a_page());
    lent_world(world, 15, 0, 0);  // 4 pages
    CHECK_EQ(world.tenant->usage.used, 4 * kPage);
    CHECK(world.tenant->usage.working);
    world.pool->lend(8, 4);
    CHECK_EQ(world.tenant->usage.mapped_free, 2 * kPage);
    CHECK_EQ(world.tenant->usage.cached, kPage);
    CHECK_EQ(world.tenant->usage.used, kPage);
    CHECK(world.tenant->usage.working);
    world.pool->lend(11, 4);
    CHECK(!world.tenant->usage.working);
    world.pool->lend(10'000, 10'000);
    CHECK(world.tenant->usage.mapped_free <= 3 * kPage);
    CHECK_EQ(world.tenant->usage.cached, 0U);
    CHECK_EQ(world.pool->used(), 15U);
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool lent: a list that is wrong changes nothing") {
    World world(four_a_page());
    lent_world(world, 15, 8, 0);
    world.tenant->limit = {kPage, 1};
    for (const Ids &wrong : {Ids{8, 9, 0}, Ids{8, 9, 8}, Ids{8, 9, 16}, Ids{8, 9, 100'000}}) {
        CHECK(world.pool->reclaim(wrong, true, true).status().code() == Code::invalid);
        CHECK_OK(world.pool->check_integrity());
        CHECK_EQ(world.pool->used(), 15U);
        CHECK_EQ(pages_of(world), 4U);
        CHECK_EQ(world.tenant->held.revision, 0U);
    }
}

TEST("pool lent: nothing is asked, and nothing goes") {
    World world(four_a_page());
    lent_world(world, 15, 15, 0);
    CHECK_EQ(reclaimed(world, {3, 2, 1, 15, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}).kept, span_of(1, 15));
    CHECK_EQ(pages_of(world), 4U);
}

TEST("pool lent: whole pages go, the highest first; what lies beside used blocks stays, and is not shown for a while") {
    World world(four_a_page());
    lent_world(world, 15, 10, 0);  // 1 to 3 on block 0's page, 4 to 7, 8 to 11, 12 to 15
    world.tenant->set_asked({2 * world.page_cost, 0, 0, 0});
    const auto out = reclaimed(world, {4, 5, 6, 7, 8, 9, 10, 12, 13, 14});
    CHECK_EQ(out.kept, (Ids{8, 9, 10, 12, 13, 14}));
    CHECK_EQ(out.evict, 0U);
    CHECK_EQ(world.tenant->usage.mapped_free, 0U);  // 6 of 4 a page would be one
    world.step();
    world.settle();
    CHECK_EQ(pages_of(world), 3U);
    std::this_thread::sleep_for(std::chrono::milliseconds(120));
    world.pool->lend(6, 0);
    CHECK_EQ(world.tenant->usage.mapped_free, kPage);
    CHECK_OK(world.pool->release(Ids{11, 15}, false));  // it may give single blocks back, too
    CHECK_OK(world.pool->check_integrity());
}

TEST("pool lent: an order is answered when the engine has dropped what it should, and not before") {
    World world(four_a_page());
    lent_world(world, 15, 4, 8);
    world.tenant->limit = {world.page_cost, 1};
    const auto first = reclaimed(world, {12, 13, 14, 15}, false, false);
    CHECK(first.kept.empty());
    CHECK_EQ(first.evict, 8U);  // two pages above the limit, of those that could go
    CHECK(first.why == Evicted::limit);
    CHECK_EQ(world.tenant->held.revision, 0U);
    world.pool->count_evicted(first.why, 8);
    world.pool->lend(8, 0);
    const auto second = reclaimed(world, span_of(4, 11), false, false);
    CHECK(second.kept.empty());
    CHECK_EQ(second.evict, 0U);
    CHECK_EQ(world.tenant->held.revision, 1U);
    CHECK_EQ(world.tenant->counters.evicted_limit, 8U);
    world.step();
    world.settle();
    CHECK_EQ(pages_of(world), 1U);
    CHECK_EQ(world.pool->used(), 3U);
}

TEST("pool lent: neighbours, trims, the idle clock and the cache's own limit ask for prefixes, each by its name") {
    const auto asked = [](Shape shape, bool idle, const std::function<void(World &)> &ask) {
        World world(shape);
        lent_world(world, 15, 0, 8);
        ask(world);
        const auto out = reclaimed(world, {}, idle, false);
        CHECK(out.evict <= 8);
        return std::pair(out.evict, out.why);
    };
    using Want = std::pair<std::uint64_t, Evicted>;
    const auto neighbour = [](World &w) { w.tenant->set_asked({0, w.page_cost + 1, 0, 0}); };
    CHECK(asked(four_a_page(), false, neighbour) == Want(8, Evicted::neighbour));
    const auto trim = [](World &w) { w.tenant->trim = {w.page_cost, 1}; };
    CHECK(asked(four_a_page(), false, trim) == Want(4, Evicted::limit));
    Shape released = four_a_page();
    released.cache_us = 2'000;
    const auto quiet = [](World &) { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
    CHECK(asked(released, true, quiet) == Want(8, Evicted::idle));
    CHECK_EQ(asked(released, false, quiet).first, 0U);
    Shape small = four_a_page();
    small.cache_limit = 1;
    CHECK(asked(small, false, [](World &) {}) == Want(4, Evicted::budget));
    small.cache_limit = 0;
    CHECK(asked(small, false, [](World &) {}).second == Evicted::budget);
    CHECK_EQ(asked(four_a_page(), true, quiet).first, 0U);
}

TEST("pool lent: the idle clock releases free pages once, down to the floor, and cached ones outlast it") {
    World world(four_a_page());
    world.tenant->floor_bytes = 2 * world.page_cost;
    lent_world(world, 15, 12, 3);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK_EQ(world.pool->next_deadline_us(true), 0U);
    const auto out = reclaimed(world, span_of(4, 15), true);
    CHECK_EQ(out.kept, span_of(4, 7));
    CHECK_EQ(out.evict, 0U);
    CHECK(world.pool->next_deadline_us(true) > 0);
    world.step();
    world.settle();
    CHECK_EQ(pages_of(world), 2U);
}

TEST("pool lent: headroom is what could be mapped, by the budget and by the addresses") {
    Shape shape = four_a_page();
    shape.budget_pages = 10;
    World world(shape);
    CHECK_EQ(world.pool->headroom_blocks(), 36U);
    lent_world(world, 15, 0, 0);
    CHECK_EQ(world.pool->headroom_blocks(), 24U);
    world.tenant->limit = {5 * world.page_cost, 1};
    CHECK_EQ(world.pool->headroom_blocks(), 4U);
    shape.budget_pages = 1'000;
    World wide(shape);
    CHECK_EQ(wide.pool->headroom_blocks(), 252U);  // of 256, those on block 0's page are mapped
}

namespace {

// As engines/sglang/ration.py plays it: takes by the extent, keeps a list and prefixes, is asked for pages.
struct Lender {
    World world;
    std::mt19937 random;
    Ids listed{};
    std::deque<std::uint32_t> cached{};
    Ids running{};
    std::map<std::uint32_t, int> written{};
    std::uint64_t grown = 0, evicted = 0, refused = 0;

    void lend() {
        world.pool->lend(static_cast<std::uint32_t>(listed.size()), static_cast<std::uint32_t>(cached.size()));
    }
    void grow(std::uint32_t missing) {
        lend();
        world.pool->ensure(missing, random() % 4 == 0);
        Ids ids(world.pool->available());
        const auto old = world.pool->take(ids);
        CHECK_OK(old);
        CHECK_EQ(old.value(), 0U);
        listed.insert(listed.end(), ids.begin(), ids.end());
        grown += ids.size();
    }
    void drop(std::uint64_t blocks) {
        for (; blocks-- > 0 && !cached.empty(); ++evicted) {
            listed.push_back(cached.front());
            written.erase(cached.front());
            cached.pop_front();
        }
    }
    void begin(std::uint32_t blocks) {
        if (listed.size() < blocks) grow(blocks - static_cast<std::uint32_t>(listed.size()));
        if (listed.size() < blocks) drop(blocks - listed.size());
        if (listed.size() < blocks) {
            ++refused;
            return;
        }
        std::sort(listed.begin(), listed.end());
        for (std::uint32_t i = 0; i < blocks; ++i) {
            const int value = static_cast<int>(random() % 100) + 1;
            world.write_all(listed[i], value);
            written[listed[i]] = value;
            running.push_back(listed[i]);
        }
        listed.erase(listed.begin(), listed.begin() + blocks);
    }
    void end() {
        std::shuffle(running.begin(), running.end(), random);
        for (std::size_t n = random() % (running.size() + 1); n > 0; --n) {
            const std::uint32_t id = running.back();
            running.pop_back();
            if (random() % 2 == 0) {
                cached.push_back(id);
            } else {
                listed.push_back(id);
                written.erase(id);
            }
        }
    }
    void reclaim(bool idle) {
        constexpr int kRounds = 12;
        std::uint64_t factor = 1;
        for (int round = 0; round < kRounds; ++round, factor *= 2) {
            const bool last = round == kRounds - 1 || cached.empty();
            lend();
            std::shuffle(listed.begin(), listed.end(), random);
            const auto out = reclaimed(world, listed, idle, last);
            CHECK(std::is_sorted(out.kept.begin(), out.kept.end()));
            for (const std::uint32_t id : out.kept) CHECK(std::find(listed.begin(), listed.end(), id) != listed.end());
            listed = out.kept;
            CHECK(out.evict <= cached.size());
            if (last || out.evict == 0) return;
            drop(out.evict * factor);
            world.pool->count_evicted(out.why, out.evict);
        }
    }
    // Nobody else's turn: what the pool says is in the engine's hands lies in exactly one of them, and is unharmed.
    void check() {
        std::vector<bool> seen(world.shape.blocks);
        std::size_t all = 0;
        const auto count = [&](const auto &ids) {
            for (const std::uint32_t id : ids) {
                CHECK(id != 0 && id < world.shape.blocks);
                CHECK(!seen[id]);
                seen[id] = true;
                ++all;
            }
        };
        count(listed);
        count(cached);
        count(running);
        CHECK_EQ(all, world.pool->used());
        for (const auto &[id, value] : written) world.check_all(id, value);
        CHECK_OK(world.pool->check_integrity());
        lend();
        const Usage &usage = world.tenant->usage;
        const std::uint64_t shown = usage.used + usage.cached + usage.mapped_free + usage.transit;
        CHECK(shown >= world.tenant->leased());  // a rank's answer may be on its way
    }
    void act() {
        const std::uint64_t cost = world.page_cost;
        switch (random() % 8) {
            case 0: {
                const std::uint64_t limit = random() % 3 == 0 ? kNoLimit : (random() % 40 + 1) * cost;
                world.tenant->limit = {limit, world.tenant->limit.revision + 1, random() % 4 == 0};
                break;
            }
            case 1: world.tenant->set_asked({random() % 8 * cost, random() % 8 * cost, 0, random() % 3 * cost}); break;
            case 2: world.tenant->trim = {random() % 6 * cost, world.tenant->trim.revision + 1}; break;
            case 3:
            case 4: end(); break;
            default: begin(static_cast<std::uint32_t>(1 + random() % 24));
        }
        if (world.pool->attention() || random() % 4 == 0) reclaim(random() % 3 == 0);
        if (random() % 2 == 0) world.step();
        world.pool->poll();
        check();
    }
    // Everything ends: what is left is block 0's.
    void leave() {
        world.tenant->limit = {kNoLimit, world.tenant->limit.revision + 1};
        listed.insert(listed.end(), running.begin(), running.end());
        running.clear();
        drop(cached.size());
        written.clear();
        world.tenant->set_asked({});
        const auto until = monotonic_ns() + 20'000'000'000;
        while (world.pool->stats().withheld != 0 || world.pool->available() != 0) {
            CHECK(monotonic_ns() < until);
            grow(1);  // what was held back for others is the engine's again
            world.pool->maintain(false);
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        CHECK_OK(world.pool->release(listed, false));
        world.pool->lend(0, 0);
        world.pool->give_all();
        world.step();
        world.settle();
        world.pool->lend(0, 0);
        CHECK_EQ(world.tenant->usage.used, world.tenant->leased());
        CHECK_EQ(world.pool->used(), 0U);
        CHECK_EQ(world.pool->stats().lost_pages, 0U);
        CHECK_EQ(pages_of(world), world.pool->stats().pages.pinned);
        CHECK_OK(world.pool->check_integrity());
    }
};

void play(const Shape &shape, unsigned seed) {
    Lender lender{World(shape), std::mt19937(seed)};
    for (int round = 0; round < 400; ++round) lender.act();
    CHECK(lender.grown > 100);
    CHECK(lender.evicted > 0);
    CHECK(lender.refused > 0);
    CHECK(lender.world.pool->stats().returned_extents > 10);
    lender.leave();
}

}  // namespace

TEST("pool lent: no block is lost or doubled, and none in use is harmed, whatever is asked and whenever") {
    for (const unsigned seed : {1U, 2U, 3U}) {
        Shape shape = four_a_page();
        shape.budget_pages = 40;
        shape.idle_us = 0;
        shape.max_extent = seed;
        play(shape, seed);
    }
}

TEST("pool lent: the same with blocks across pages, several spans and several ranks") {
    for (const unsigned seed : {4U, 5U, 6U}) {
        Shape shape;
        shape.blocks = 128;
        shape.block_bytes = 24 * 1024;
        shape.budget_pages = 30;
        shape.spans = seed % 2 == 0 ? 1 : 2;
        shape.ranks = seed % 3 == 0 ? 2 : 1;
        shape.max_extent = 4;
        shape.cache_us = 0;
        shape.idle_us = 0;
        shape.cache_limit = seed == 4 ? 6 : kNever;
        play(shape, seed);
    }
}
