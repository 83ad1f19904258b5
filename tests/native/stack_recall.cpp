// Taking back, from both ends of the page table: a rank that is ordered by hand, and a pool that is answered by hand.
#include <atomic>
#include <mutex>
#include <set>

#include "base/faultpoint.hpp"
#include "pool_fixture.hpp"
#include "stack_fixture.hpp"

namespace {

using namespace elastickv;

constexpr std::uint64_t kBytes = 64 * 1024;

// A rank alone: the test is the pool, and counts what is mapped and what is given back.
struct Ordered {
    std::shared_ptr<PageTable> table;
    std::unique_ptr<Rank> rank;
    std::atomic<std::int64_t> mapped{0};
    std::atomic<std::uint64_t> given{0};
    std::uint32_t generation = 0;

    Ordered() {
        auto driver = make_host_driver({kBytes, 0});
        CHECK_OK(driver);
        auto made = PageTable::create(16, 1, 7);
        CHECK_OK(made);
        table = *made;
        const RankHooks hooks{[this](std::int64_t bytes) { mapped += bytes; },
                              [this](std::uint64_t bytes) { given += bytes; }};
        auto attached = Rank::attach(*driver, table, {0, 1, 16 * kBytes, kBytes}, hooks);
        CHECK_OK(attached);
        rank = std::move(attached).value();
    }
    ~Ordered() { rank.reset(); }
    Ordered(const Ordered &) = delete;
    Ordered &operator=(const Ordered &) = delete;

    void place(std::uint32_t page, Wanted wanted, std::uint64_t ticket) {
        wanted.generation = ++generation;
        wanted.pages = 2;
        table->order(page, wanted, ticket);
    }
    Answer answered(std::uint32_t page) {
        table->ring_ranks();
        const auto look = [&] { return Answer::unpack(table->so(0, page).load(std::memory_order_acquire)); };
        const std::uint32_t wanted = Wanted::unpack(table->wanted(page).load()).generation;
        for (int i = 0; i < 20'000 && (look().generation != wanted || table->rank(0).giving.load() != 0); ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        CHECK_EQ(look().generation, wanted);
        return look();
    }
    So order(std::uint32_t page, const Wanted &wanted, std::uint64_t ticket = 0) {
        place(page, wanted, ticket);
        return answered(page).so;
    }
    void check(std::int64_t pages, std::uint64_t gone) const {
        CHECK_EQ(mapped.load(), pages * static_cast<std::int64_t>(kBytes));
        CHECK_EQ(given.load(), gone * kBytes);
    }
};

constexpr Wanted kMap{.map = true}, kUnmap{.fenced = true};
constexpr Wanted kRecall{.map = true, .recall = true}, kEnd{.fenced = true, .recall = true};

// A pool alone: a thread answers for its ranks, as `recalled` says where an extent is ordered to stay.
class Answering {
  public:
    Answering(std::shared_ptr<PageTable> of, std::shared_ptr<FakeTenant> tenant, std::uint64_t share,
              std::uint32_t lets_go)
        : table_(std::move(of)), tenant_(std::move(tenant)), share_(share), lets_go_(lets_go), thread_([this] {
              while (!stop_) {
                  for (std::uint32_t page = 0; page < table_->pages(); ++page)
                      for (std::uint32_t rank = 0; rank < table_->ranks(); ++rank) look(rank, page);
                  futex_ring(table_->header().answer_bell);
                  std::this_thread::sleep_for(std::chrono::microseconds(200));
              }
          }) {}
    ~Answering() {
        stop_ = true;
        thread_.join();
    }
    Answering(const Answering &) = delete;
    Answering &operator=(const Answering &) = delete;

    std::atomic<bool> fences_pass{false};
    std::atomic<std::uint32_t> recalls{0};

  private:
    void look(std::uint32_t rank, std::uint32_t page) {
        const auto wanted = Wanted::unpack(table_->wanted(page).load(std::memory_order_acquire));
        const auto so = Answer::unpack(table_->so(rank, page).load(std::memory_order_relaxed));
        if (wanted.generation == 0 || so.generation == wanted.generation) return;
        if (!wanted.map && wanted.fenced && !fences_pass) return;
        So answer = wanted.map ? So::mapped : So::unmapped;
        bool gives = !wanted.map;
        if (wanted.map && wanted.recall && ++recalls != 0 && rank < lets_go_) {
            answer = So::failed;  // its fence had passed a moment before the order came
            gone_.emplace(rank, page);
            gives = true;
        } else if (!wanted.map && wanted.recall) {
            gives = !gone_.contains({rank, page});
        }
        table_->so(rank, page).store(Answer{wanted.generation, answer}.pack(), std::memory_order_release);
        if (gives) tenant_->give(share_ * wanted.pages);
    }

    std::shared_ptr<PageTable> table_;
    std::shared_ptr<FakeTenant> tenant_;
    const std::uint64_t share_;
    const std::uint32_t lets_go_;
    std::set<std::pair<std::uint32_t, std::uint32_t>> gone_;
    std::atomic<bool> stop_{false};
    std::thread thread_;
};

void some_let_go(std::uint32_t lets_go) {
    constexpr std::uint32_t kRanks = 3;
    auto budget = std::make_shared<Budget>();
    budget->capacity = 1000 * kRanks * kBytes;
    auto tenant = std::make_shared<FakeTenant>(budget);
    auto table = PageTable::create(64, kRanks, 7);
    CHECK_OK(table);
    PoolOptions options;
    options.num_blocks = 64;
    options.block_bytes = options.page_bytes = kBytes;
    options.stock_pages = options.idle_release_us = 0;
    auto pool = Pool::make(*table, {{tenant, kRanks * kBytes}}, options);
    CHECK_OK(pool);
    Answering answers(*table, tenant, kBytes, lets_go);
    CHECK_OK((*pool)->wait_ready(20'000));
    std::vector<std::uint32_t> ids(6), again(6);
    std::uint32_t evicted = 0;
    CHECK((*pool)->alloc(ids, &evicted));
    CHECK_OK((*pool)->release(ids, false));
    (*pool)->maintain(true);
    CHECK((*pool)->alloc(again, &evicted));
    CHECK_EQ(answers.recalls.load(), 6 * kRanks);
    CHECK_OK((*pool)->check_integrity());
    CHECK_EQ((*pool)->stats().pages.leaving, lets_go == 0 ? 0U : 6U);
    CHECK_EQ((*pool)->stats().recalled_extents, lets_go == 0 ? 6U : 0U);
    CHECK_EQ((*pool)->stats().map_failures, 0U);
    CHECK((ids == again) == (lets_go == 0));
    answers.fences_pass = true;
    for (int i = 0; i < 20'000 && ((*pool)->stats().pages.transit != 0 || tenant->leased() != 7 * kRanks * kBytes); ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK_EQ(tenant->leased(), 7 * kRanks * kBytes);  // each rank's share of each page once
    CHECK_EQ((*pool)->stats().returned_extents, lets_go == 0 ? 0U : 6U);
    CHECK_OK((*pool)->check_integrity());
}

}  // namespace

TEST("recall: a rank keeps what waits for its fence, unmaps nothing when that passes, and gives it back once") {
    Ordered one;
    CHECK(one.order(0, kMap) == So::mapped);
    one.place(0, kUnmap, 1);
    CHECK(one.order(0, kRecall, 1) == So::mapped);
    CHECK_OK(one.rank->fence(1, 0));
    for (int i = 0; i < 20'000 && one.table->rank(0).fence_passed.load() < 1; ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK(one.order(4, kMap) == So::mapped);  // the mapper has gone on since
    one.check(4, 0);
    CHECK(one.order(0, kEnd, 1) == So::unmapped);  // another rank had let go
    one.check(2, 2);
}

TEST("recall: a rank that has let go maps nothing and gives nothing a second time") {
    Ordered one;
    CHECK_OK(one.rank->fence(1, 0));
    CHECK(one.order(0, kMap) == So::mapped);
    CHECK(one.order(0, kUnmap, 1) == So::unmapped);
    one.check(0, 2);
    CHECK(one.order(0, kRecall, 1) == So::failed);
    CHECK(one.order(0, kEnd, 1) == So::unmapped);
    one.check(0, 2);
    CHECK(one.order(0, kMap) == So::mapped);  // the next one on these pages is as any other
    CHECK(one.order(0, kUnmap, 1) == So::unmapped);
    one.check(0, 4);
}

TEST("recall: a rank does not keep what the driver would not let go of whole") {
    Ordered one;
    CHECK_OK(one.rank->fence(1, 0));
    CHECK(one.order(0, kMap) == So::mapped);
    CHECK(fault::set("memory.unmap.begin", fault::Action::fail, 0) == fault::Setting::done);
    CHECK(one.order(0, kUnmap, 1) == So::stuck);
    fault::clear();
    CHECK(one.order(0, kRecall, 1) == So::failed);
    one.check(2, 0);
    CHECK(one.order(0, kEnd, 1) == So::unmapped);
    one.check(0, 2);
}

TEST("recall: a rank that was lapped finds the order in its word") {
    Ordered one;
    CHECK(one.order(0, kMap) == So::mapped);
    one.place(0, kUnmap, 1);
    one.place(0, kRecall, 1);
    for (int i = 0; i < 2000; ++i) one.place(8, {.recall = true}, 0);  // about an extent that is not there
    CHECK(one.answered(0).so == So::mapped);
    CHECK(one.answered(8).so == So::unmapped);
    one.check(2, 0);
}

TEST("recall: what all ranks kept is used again") { some_let_go(0); }
TEST("recall: what one of three ranks had let go of goes, and every lease goes back once") { some_let_go(1); }
TEST("recall: the same where all of them had") { some_let_go(3); }

TEST("recall: blocks that work is still under way on are handed out again, and nothing goes under it") {
    using namespace stacktest;
    ledgertest::Directory directory;
    auto ledger = ledgertest::open(directory, kDevice);
    Engine engine(2);
    auto made = Stack::make(ledger, engine, {});
    CHECK_OK(made);
    Stack &stack = **made;
    const auto ids = stack.freed_under_way(12);
    stack.step({});
    const std::uint64_t unmaps = standin_calls("cuMemUnmap"), created = standin_calls("cuMemCreate");
    CHECK(stack.alloc(12) == ids);
    CHECK(stack.pool->stats().recalled_extents > 0);
    CHECK_EQ(standin_calls("cuMemCreate"), created);
    stack.step(ids);
    for (void *stream : engine.streams) standin_hold(stream, 0);
    stack.step(ids);
    stack.settle();
    CHECK_EQ(standin_calls("cuMemUnmap"), unmaps);
    stack.check_books(ledger);
    CHECK_EQ(standin_violations(), 0U);
}
