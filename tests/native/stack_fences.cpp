// The whole stack on the stand-in: no page goes under work that has not completed, whatever is late, and a mapping that
// one rank cannot make is made on none.
#include <atomic>
#include <random>

#include "stack_fixture.hpp"

namespace {

using namespace stacktest;

// The GPU: streams stand still and go on, at a pace of its own. Every unmapping is checked by the stand-in against the
// work that is enqueued, and all work against what is mapped when it is carried out.
class Gpu {
  public:
    explicit Gpu(unsigned seed)
        : thread_([this, seed] {
              std::mt19937 random(seed);
              while (!stop_) {
                  standin_hold_all();
                  std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
                  standin_let_all_go();
                  std::this_thread::sleep_for(std::chrono::microseconds(random() % 1000));
              }
              standin_let_all_go();
          }) {}
    ~Gpu() {
        stop_ = true;
        thread_.join();
    }
    Gpu(const Gpu &) = delete;
    Gpu &operator=(const Gpu &) = delete;

  private:
    std::atomic<bool> stop_{false};
    std::thread thread_;
};

// Blocks come and go at random, in steps; a neighbour takes and gives back memory, so that pages are asked for.
struct Load {
    Stack &stack;
    Tenant &neighbour;
    std::mt19937 random;
    std::vector<std::uint32_t> live, cached;
    std::uint64_t lent = 0, none = 0;

    void forget(const std::vector<std::uint32_t> &evicted) {
        for (const std::uint32_t block : evicted) std::erase(cached, block);
    }
    void grow() {
        const std::uint32_t n = 1 + static_cast<std::uint32_t>(random() % 10);
        std::vector<std::uint32_t> ids(n);
        std::uint32_t evicted = 0;
        if (!stack.pool->alloc(ids, &evicted)) {
            ++none;
            return;
        }
        forget({ids.end() - evicted, ids.end()});
        live.insert(live.end(), ids.begin(), ids.end());
    }
    void shrink(bool keep) {
        std::shuffle(live.begin(), live.end(), random);
        const auto n = static_cast<std::ptrdiff_t>(live.size() * (random() % 100) / 100);
        const std::vector<std::uint32_t> gone(live.begin(), live.begin() + n);
        live.erase(live.begin(), live.begin() + n);
        CHECK_OK(stack.pool->release(gone, keep));
        if (keep) cached.insert(cached.end(), gone.begin(), gone.end());
    }
    void reuse() {
        if (cached.empty()) return;
        CHECK_OK(stack.pool->touch(cached.back()));
        live.push_back(cached.back());
        cached.pop_back();
    }
    void lend() {
        const std::uint64_t wanted = 1 + random() % (8 * ledgertest::MiB);
        if (random() % 2 == 0 || !neighbour.lease(wanted, true).ok()) {
            neighbour.give(lent);
            lent = 0;
        } else {
            lent += wanted;
        }
    }
    void act() {
        switch (random() % 8) {
            case 0:
            case 1: return grow();
            case 2: return shrink(false);
            case 3: return shrink(true);
            case 4: return reuse();
            case 5: return lend();
            default: return forget(stack.pool->maintain(random() % 2 == 0));
        }
    }
};

bool few_moved(Stack &stack) {
    const PoolStats stats = stack.pool->stats();
    return stats.returned_extents < 5 || stats.recalled_extents < 5;
}

void random_load(unsigned seed, const Form &form, int rounds) {
    ledgertest::Directory directory;
    auto ledger = ledgertest::open(directory, 14 * ledgertest::MiB);
    Engine engine(form.ranks);
    {
        auto made = Stack::make(ledger, engine, form);
        CHECK_OK(made);
        Stack &stack = **made;
        auto neighbour = ledgertest::join(ledger, "neighbour");
        Load load{stack, *neighbour, std::mt19937(seed), {}, {}};
        {
            const Gpu gpu(seed);
            // More rounds on a slow machine, until there was something to get wrong.
            for (int round = 0; round < rounds || (few_moved(stack) && round < 40 * rounds); ++round) {
                load.act();
                stack.step(load.live);
                if (round % 32 == 0) CHECK_OK(stack.pool->check_integrity());
                if (standin_violations() != 0) check::fail(__FILE__, __LINE__, standin_last_violation());
            }
        }
        stack.step(load.live);
        stack.settle();
        neighbour->give(load.lent);
        stack.check_books(ledger);
        CHECK(!few_moved(stack));
        CHECK_EQ(standin_violations(), 0U);
    }
    engine.check_alone();
}

}  // namespace

TEST("stack: nothing is unmapped under work, with streams that stand still, under random load") {
    for (const unsigned seed : {1U, 2U, 3U}) random_load(seed, {}, 900 / kSlow);
}

TEST("stack: the same with one span, three ranks and extents of one page") {
    Form form;
    form.spans = 1;
    form.ranks = 3;
    form.max_extent = 1;
    random_load(4, form, 900 / kSlow);
}

TEST("stack: the same where a kind of call is slow, each kind in turn") {
    for (const char *function : {"cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap", "cuMemRelease",
                                 "cuMemsetD8Async", "cuEventCreate", "cuEventRecord", "cuEventQuery"}) {
        ledgertest::Directory directory;
        auto ledger = ledgertest::open(directory, kDevice);
        Engine engine(2);
        standin_delay(function, 1500);
        {
            auto made = Stack::make(ledger, engine, {});
            CHECK_OK(made);
            Stack &stack = **made;
            auto ids = stack.alloc(20);
            CHECK_EQ(ids.size(), 20U);
            stack.step(ids);
            const std::vector<std::uint32_t> gone(ids.begin() + 6, ids.end());
            ids.resize(6);
            CHECK_OK(stack.pool->release(gone, false));
            stack.pool->maintain(true);
            CHECK_EQ(stack.alloc(10).size(), 10U);  // while the others are on their way out
            stack.step(ids);
            stack.settle();
            stack.check_books(ledger);
        }
        CHECK_EQ(standin_violations(), 0U);
        engine.check_alone();
    }
}

TEST("stack: an order to unmap waits for the work that was in the stream, on every rank") {
    ledgertest::Directory directory;
    auto ledger = ledgertest::open(directory, kDevice);
    Engine engine(2);
    auto made = Stack::make(ledger, engine, {});
    CHECK_OK(made);
    Stack &stack = **made;
    const auto ids = stack.freed_under_way(12);
    const std::uint64_t unmaps = standin_calls("cuMemUnmap");
    for (std::size_t rank = 0; rank < 2; ++rank) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        CHECK_EQ(standin_calls("cuMemUnmap"), unmaps);  // the order alone is not enough
    }
    stack.step({});
    standin_hold(engine.streams[0], 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    stack.pool->poll();
    CHECK(stack.pool->stats().pages.transit > 0);  // rank 1's work is still there
    CHECK(ledgertest::row_of(ledger, "stack").leased > stack.form.page_cost());
    standin_hold(engine.streams[1], 0);
    stack.settle();
    stack.check_books(ledger);
    CHECK_EQ(standin_violations(), 0U);
}

TEST("stack: what one rank cannot map is mapped on none") {
    for (const char *function : {"cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async"}) {
        ledgertest::Directory directory;
        auto ledger = ledgertest::open(directory, kDevice);
        Engine engine(3);
        Form form;
        form.ranks = 3;
        form.spans = 1;
        auto made = Stack::make(ledger, engine, form);
        CHECK_OK(made);
        Stack &stack = **made;
        const std::uint64_t before = standin_used_bytes(0);
        standin_fail(function, 2, 2);  // of three ranks one fails, whichever comes second
        CHECK(stack.alloc(1).empty());
        CHECK_EQ(stack.pool->stats().map_failures, 1U);
        stack.settle();
        CHECK_EQ(standin_used_bytes(0), before);
        stack.check_books(ledger);
        CHECK_EQ(stack.alloc(1).size(), 1U);
        stack.check_books(ledger);
    }
}
