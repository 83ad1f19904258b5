// A whole tenant over the stand-in for CUDA: a real ledger, a pool, several ranks, each with a stream of its engine's.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "driver_standin.hpp"
#include "ledger_support.hpp"
#include "memory/rank.hpp"
#include "pool/pool.hpp"
#include "standin/standin.h"

// What an engine calls itself, from the same library.
extern "C" int cuInit(unsigned flags);
extern "C" int cuDevicePrimaryCtxRetain(void **context, int device);
extern "C" int cuCtxSetCurrent(void *context);
extern "C" int cuStreamCreate(void **stream, unsigned flags);

namespace stacktest {

using namespace elastickv;

inline constexpr std::uint64_t kPage = 64 * 1024;
inline constexpr std::uint64_t kDevice = 48 * ledgertest::MiB;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr int kSlow = 6;  // how many times fewer rounds where every one takes longer
#else
inline constexpr int kSlow = 1;
#endif

struct Form {
    std::uint32_t blocks = 96;
    std::uint64_t block_bytes = 40 * 1024;  // most blocks lie on two pages
    std::uint64_t spans = 2;
    std::uint32_t ranks = 2;
    std::uint32_t max_extent = 4;
    std::uint64_t idle_us = 0;  // maintain(true) gives back all that is free, at once
    std::uint64_t map_deadline_us = 5'000'000;

    std::uint64_t span_bytes() const { return (blocks * block_bytes + kPage - 1) / kPage * kPage; }
    std::uint64_t page_cost() const { return kPage * spans * ranks; }
};

// The engine: it has a context and a stream for each rank before anything of ours begins.
struct Engine {
    std::vector<void *> streams;

    explicit Engine(std::uint32_t ranks) {
        standin_reset(1, kDevice, kPage, 0);
        void *context = nullptr;
        CHECK_EQ(cuInit(0) + cuDevicePrimaryCtxRetain(&context, 0) + cuCtxSetCurrent(context), 0);
        streams.resize(ranks);
        for (void *&stream : streams) CHECK_EQ(cuStreamCreate(&stream, 1), 0);
    }
    ~Engine() { standin_reset(0, 0, 0, 0); }
    Engine(const Engine &) = delete;
    Engine &operator=(const Engine &) = delete;

    // What there is once everything of ours has gone.
    void check_alone() const {
        CHECK_EQ(standin_alive("reservations"), 0U);
        CHECK_EQ(standin_alive("mappings"), 0U);
        CHECK_EQ(standin_alive("memory"), 0U);
        CHECK_EQ(standin_alive("events"), 0U);
        CHECK_EQ(standin_alive("streams"), streams.size());
        CHECK_EQ(standin_context_references(0), 1);
        CHECK_EQ(standin_used_bytes(0), 0U);
    }
};

// Built step by step; the first step that fails is the answer, and everything made so far goes again.
class Stack {
  public:
    static Result<std::unique_ptr<Stack>> make(const std::shared_ptr<Ledger> &ledger, Engine &engine,
                                               const Form &form) {
        std::unique_ptr<Stack> stack(new Stack(engine, form));
        if (Status status = stack->build(ledger); !status.ok()) return status;
        return stack;
    }
    ~Stack() {
        if (pool) pool->close();
        ranks.clear();
        pool.reset();
    }
    Stack(const Stack &) = delete;
    Stack &operator=(const Stack &) = delete;

    // What travels with a step: the orders so far are fenced on every rank, then the step's own work begins.
    void step(const std::vector<std::uint32_t> &live) {
        for (std::size_t r = 0; r < ranks.size(); ++r) {
            CHECK_OK(ranks[r]->fence(pool->ticket(), reinterpret_cast<std::uintptr_t>(engine.streams[r])));
            for (const std::uint32_t block : live) work(r, block);
        }
    }
    void work(std::size_t rank, std::uint32_t block) {
        for (std::uint64_t span = 0; span < form.spans; ++span) {
            const Address at = ranks[rank]->address() + span * form.span_bytes() + block * form.block_bytes;
            standin_work(engine.streams[rank], at, form.block_bytes);
        }
    }
    // `n` blocks that are free again and are to be given back, while a step on the last of them is held on every rank.
    std::vector<std::uint32_t> freed_under_way(std::uint32_t n) {
        const auto ids = alloc(n);
        step(ids);
        for (void *stream : engine.streams) standin_hold(stream, 1);
        for (std::size_t rank = 0; rank < ranks.size(); ++rank) work(rank, ids.back());
        CHECK_OK(pool->release(ids, false));
        pool->maintain(true);
        return ids;
    }
    std::vector<std::uint32_t> alloc(std::uint32_t n) {
        std::vector<std::uint32_t> ids(n);
        std::uint32_t evicted = 0;
        if (!pool->alloc(ids, &evicted)) ids.clear();
        return ids;
    }
    void settle() {
        for (int i = 0; i < 20'000; ++i) {
            pool->poll();
            if (pool->stats().pages.transit == 0) return;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        check::fail(__FILE__, __LINE__, "orders were not answered in 20 s");
    }
    // At a quiet point pool, ledger, drivers and device say the same.
    void check_books(const std::shared_ptr<Ledger> &ledger) {
        CHECK_OK(pool->check_integrity());
        std::uint64_t mapped = 0;
        for (const auto &driver : drivers) {
            mapped += driver->stats().mapped_bytes;
            CHECK_EQ(driver->stats().mapped_bytes, driver->stats().created_bytes);
        }
        CHECK_EQ(standin_used_bytes(0), mapped);
        for (int i = 0; i < 5000 && ledgertest::row_of(ledger, "stack").leased != mapped; ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the lease goes back after the answer
        CHECK_EQ(ledgertest::row_of(ledger, "stack").mapped, mapped);
        CHECK_EQ(ledgertest::row_of(ledger, "stack").leased, mapped);
    }

    Engine &engine;
    const Form form;
    std::vector<std::shared_ptr<Driver>> drivers;  // one a rank
    std::shared_ptr<Tenant> tenant;
    std::shared_ptr<PageTable> table;
    std::unique_ptr<Pool> pool;
    std::vector<std::unique_ptr<Rank>> ranks;

  private:
    Stack(Engine &of, const Form &wanted) : engine(of), form(wanted) {}

    Status build(const std::shared_ptr<Ledger> &ledger) {
        tenant = ledgertest::join(ledger, "stack");
        auto made = PageTable::create(form.span_bytes() / kPage, form.ranks, tenant->incarnation());
        CHECK_OK(made);
        table = *made;
        PoolOptions options;
        options.num_blocks = form.blocks;
        options.block_bytes = form.block_bytes;
        options.page_bytes = kPage;
        options.max_extent_pages = form.max_extent;
        options.stock_pages = 0;
        options.idle_release_us = form.idle_us;
        options.give_back_wait_us = 1000;
        options.map_deadline_us = form.map_deadline_us;
        auto pooled = Pool::make(table, {{tenant, form.page_cost()}}, options);
        CHECK_OK(pooled);
        pool = std::move(pooled).value();
        for (std::uint32_t r = 0; r < form.ranks; ++r) {
            if (Status status = attach(ledger, r); !status.ok()) return status;
        }
        return pool->wait_ready(20'000);
    }
    Status attach(const std::shared_ptr<Ledger> &ledger, std::uint32_t rank) {
        CudaOptions options;
        options.library = contract::standin_path();
        auto driver = make_cuda_driver(options);
        if (!driver.ok()) return driver.status();
        auto member = ledger->attach(tenant->slot(), tenant->incarnation());
        CHECK_OK(member);
        const std::shared_ptr<Tenant> own = std::move(member).value();
        RankHooks hooks{[own](std::int64_t bytes) { own->add_mapped(bytes); },
                        [own](std::uint64_t bytes) { own->give(bytes); }};
        auto attached = Rank::attach(*driver, table, {rank, form.spans, form.span_bytes(), kPage}, std::move(hooks));
        if (!attached.ok()) return attached.status();
        drivers.push_back(*driver);
        ranks.push_back(std::move(attached).value());
        return {};
    }
};

}  // namespace stacktest
