// A pool with its ranks over the host driver, in one process.
#pragma once

#include <cstring>
#include <thread>
#include <vector>

#include "check.hpp"
#include "driver/faulty.hpp"
#include "driver/host.hpp"
#include "fake_tenant.hpp"
#include "memory/rank.hpp"
#include "pool/pool.hpp"

namespace elastickv {

struct Shape {
    std::uint32_t blocks = 256;
    std::uint64_t block_bytes = 24 * 1024;
    std::uint64_t page_bytes = 64 * 1024;
    std::uint64_t spans = 1;
    std::uint32_t ranks = 1;
    std::uint32_t max_extent = 1;
    std::uint64_t budget_pages = 1'000'000;
    std::uint64_t stock_pages = 0;
    std::uint64_t idle_us = 1'000, cache_us = kNever, wait_us = 1'000;
    std::uint64_t cache_limit = kNever;
    std::shared_ptr<Driver> driver;
};

struct World {
    Shape shape;
    std::shared_ptr<Budget> budget = std::make_shared<Budget>();
    std::shared_ptr<FakeTenant> tenant;
    std::shared_ptr<Driver> driver;
    std::shared_ptr<PageTable> table;
    std::unique_ptr<Pool> pool;
    std::vector<std::unique_ptr<Rank>> ranks;
    std::uint64_t page_cost = 0;

    explicit World(const Shape &wanted) : shape(wanted) {
        page_cost = shape.page_bytes * shape.spans * shape.ranks;
        budget->capacity = shape.budget_pages * page_cost;
        tenant = std::make_shared<FakeTenant>(budget);
        driver = shape.driver;
        if (!driver) {
            auto made = make_host_driver({shape.page_bytes, 0});
            CHECK_OK(made);
            driver = std::move(made).value();
        }
        const std::uint64_t span = shape.blocks * shape.block_bytes;
        auto made = PageTable::create((span + shape.page_bytes - 1) / shape.page_bytes, shape.ranks, 7);
        CHECK_OK(made);
        table = std::move(made).value();
        PoolOptions options{shape.blocks,  shape.block_bytes, shape.page_bytes, shape.max_extent, shape.stock_pages,
                            shape.idle_us, shape.cache_us,    shape.wait_us,    2'000'000,        shape.cache_limit};
        auto pooled = Pool::make(table, {{tenant, page_cost}}, options);
        CHECK_OK(pooled);
        pool = std::move(pooled).value();
        for (std::uint32_t r = 0; r < shape.ranks; ++r) {
            RankHooks hooks{[t = tenant](std::int64_t b) { t->add_mapped(b); },
                            [t = tenant](std::uint64_t b) { t->give(b); }};
            auto rank = Rank::attach(driver, table, {r, shape.spans, span, shape.page_bytes}, hooks);
            CHECK_OK(rank);
            ranks.push_back(std::move(rank).value());
        }
        CHECK_OK(pool->wait_ready(5000));
    }

    // The orders' fence reaches every rank, as with a step; on the host it has passed at once.
    void step() {
        for (auto &rank : ranks) CHECK_OK(rank->fence(pool->ticket(), 0));
    }
    // Waits until nothing is in transit.
    void settle() {
        for (int i = 0; i < 2000; ++i) {
            if (pool->stats().pages.transit == 0) return;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        check::fail(__FILE__, __LINE__, "orders were not answered in 2 s");
    }
    std::vector<std::uint32_t> alloc(std::uint32_t n) {
        std::vector<std::uint32_t> ids(n);
        std::uint32_t evicted = 0;
        if (!pool->alloc(ids, &evicted)) ids.clear();
        return ids;
    }
    std::byte *piece(std::uint32_t rank, std::uint64_t span, std::uint32_t block) {
        const Address base = ranks[rank]->address() + span * shape.blocks * shape.block_bytes;
        return reinterpret_cast<std::byte *>(base + block * shape.block_bytes);
    }
    void write_all(std::uint32_t block, int value) {
        for (std::uint32_t r = 0; r < shape.ranks; ++r)
            for (std::uint64_t s = 0; s < shape.spans; ++s) std::memset(piece(r, s, block), value, shape.block_bytes);
    }
    void check_all(std::uint32_t block, int value) {
        for (std::uint32_t r = 0; r < shape.ranks; ++r)
            for (std::uint64_t s = 0; s < shape.spans; ++s)
                for (std::uint64_t i = 0; i < shape.block_bytes; i += 512)
                    CHECK_EQ(static_cast<int>(piece(r, s, block)[i]), value);
    }
};

}  // namespace elastickv
