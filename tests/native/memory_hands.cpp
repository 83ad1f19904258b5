// Two hands: a helper beside the mapper, by itself and in a rank whose driver calls take long.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "memory/hands.hpp"
#include "stack_fixture.hpp"

namespace {

using namespace elastickv;
using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kDelayUs = 20'000;

std::vector<std::uint32_t> numbers(std::uint32_t count) {
    std::vector<std::uint32_t> made(count);
    std::iota(made.begin(), made.end(), 0U);
    return made;
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// One rank, with as many extents of one page as it has blocks.
stacktest::Form small_extents() {
    stacktest::Form form;
    form.blocks = 40;
    form.block_bytes = stacktest::kPage;
    form.spans = 1;
    form.ranks = 1;
    form.max_extent = 1;
    return form;
}

// A ledger, an engine, and a stack of that form.
struct Place {
    ledgertest::Directory directory;
    std::shared_ptr<Ledger> ledger = ledgertest::open(directory, stacktest::kDevice);
    stacktest::Engine engine{1};
    std::unique_ptr<stacktest::Stack> stack;

    Place() {
        auto made = stacktest::Stack::make(ledger, engine, small_extents());
        CHECK_OK(made);
        stack = std::move(made).value();
    }
};

}  // namespace

TEST("hands: every page is taken once, and the helper has its part") {
    for (int round = 0; round < 20; ++round) {
        std::vector<std::atomic<int>> taken(64);
        std::atomic<int> helped{0};
        Hands hands([] { return true; },
                    [&](std::uint32_t page) {
                        ++taken[page];
                        ++helped;
                    });
        for (int share = 0; share < 10; ++share) {
            const auto all = numbers(static_cast<std::uint32_t>(1 + share * 7));
            const int before = helped;
            hands.share(all, [&](std::uint32_t page) {
                ++taken[page];
                // Page 0 waits until the helper has taken one, which it can wherever there is another.
                for (int i = 0; i < 10'000 && page == 0 && all.size() > 1 && helped == before; ++i)
                    std::this_thread::sleep_for(std::chrono::milliseconds(1));
            });
            if (all.size() > 1) CHECK(helped > before);
        }
        for (std::size_t page = 0; page < taken.size(); ++page)
            CHECK_EQ(taken[page].load(), 10 - static_cast<int>((page + 6) / 7));
    }
}

TEST("hands: short work in many rounds, and one end among them") {
    std::atomic<std::uint64_t> sum{0};
    std::uint64_t wanted = 0;
    {
        Hands hands([] { return true; }, [&](std::uint32_t page) { sum += page; });
        for (std::uint32_t round = 0; round < 20'000 / stacktest::kSlow; ++round) {
            const auto all = numbers(round % 9);
            wanted += std::accumulate(all.begin(), all.end(), std::uint64_t{0});
            hands.share(all, [&](std::uint32_t page) { sum += page; });
            CHECK_EQ(sum.load(), wanted);
        }
    }
    CHECK_EQ(sum.load(), wanted);
}

TEST("hands: a helper that cannot begin takes nothing") {
    std::atomic<int> asked{0}, helped{0}, own{0};
    {
        Hands hands(
            [&] {
                ++asked;
                return false;
            },
            [&](std::uint32_t) { ++helped; });
        for (int i = 0; i < 10'000 && asked == 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        hands.share(numbers(100), [&](std::uint32_t) { ++own; });
    }
    CHECK(asked > 0);
    CHECK_EQ(helped.load(), 0);
    CHECK_EQ(own.load(), 100);
}

TEST("stack: two hands map and unmap in less than one takes for its calls alone") {
    const Place place;
    stacktest::Stack &stack = *place.stack;
    standin_delay("cuMemSetAccess", kDelayUs);
    standin_delay("cuMemUnmap", kDelayUs);
    auto start = Clock::now();
    const auto ids = stack.alloc(32);
    CHECK_EQ(ids.size(), 32U);
    CHECK(seconds_since(start) < 32 * kDelayUs / 1e6);
    CHECK_OK(stack.pool->release(ids, false));
    stack.pool->maintain(true);
    start = Clock::now();
    stack.step({});
    stack.settle();
    CHECK(seconds_since(start) < 32 * kDelayUs / 1e6);
    standin_delay("cuMemSetAccess", 0);
    standin_delay("cuMemUnmap", 0);
    stack.check_books(place.ledger);
    CHECK_EQ(standin_violations(), 0U);
}

TEST("stack: where the helper finds no memory, the mapper has some given up first") {
    const Place place;
    stacktest::Stack &stack = *place.stack;
    Rank &rank = *stack.ranks.front();
    std::atomic<bool> over{false};
    std::atomic<int> asked{0};
    rank.offer_reclaim(true);
    std::thread gives([&] {
        for (std::uint32_t seen = 0; !over;) {
            const std::uint32_t request = rank.wait_reclaim(seen, 10'000);
            if (request == seen) continue;
            ++asked;
            standin_heal();  // what failed for want of memory finds some now
            seen = request;
            rank.reclaimed(request);
        }
    });
    standin_delay("cuMemCreate", 2000);  // both hands have some of the 16 before memory is given up
    for (int nth = 1; nth <= 64; ++nth) standin_fail("cuMemCreate", nth, 2);
    const auto ids = stack.alloc(16);
    over = true;
    gives.join();
    standin_delay("cuMemCreate", 0);
    standin_heal();
    CHECK(asked > 0);
    CHECK_EQ(ids.size(), 16U);
    stack.settle();
    stack.check_books(place.ledger);
}

TEST("stack: a forked child leaves both hands to its parent") {
    const Place place;
    stacktest::Stack &stack = *place.stack;
    CHECK_EQ(stack.alloc(16).size(), 16U);
    std::fflush(nullptr);
    const pid_t child = ::fork();
    if (child == 0) {
        ::alarm(30);  // a child that waits for a thread it does not have would wait for ever
        stack.ranks.front()->close();
        stack.ranks.clear();
        ::_exit(0);
    }
    int status = 0;
    CHECK_EQ(::waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK_EQ(stack.alloc(16).size(), 16U);
    stack.check_books(place.ledger);
}
