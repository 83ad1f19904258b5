// Many tenants under the policy, in simulated time: shares follow weights, nobody starves.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "ledger/policy.hpp"
#include "ledger_support.hpp"

#ifndef __SANITIZE_THREAD__  // one thread alone, and 40 s of it

using namespace ledgertest;
using namespace elastickv::policy;

namespace {

constexpr std::uint64_t kPage = 2 * MiB;
constexpr std::uint64_t kTick = 1'000'000;  // 1 ms

// Engines that always want more. Each tick some of their pages become free; they give back what is asked and take
// what they get.
struct Simulation {
    Snapshot s;
    std::mt19937 random{11};
    std::uint64_t tickets = 0;
    std::vector<std::uint64_t> wins;

    Simulation(const std::vector<std::uint32_t> &weights, std::uint64_t pages) : wins(weights.size()) {
        s.now_ns = 1'000'000'000;
        s.capacity = pages * kPage;
        for (const std::uint32_t weight : weights) {
            Claim &claim = s.claims[static_cast<std::size_t>(s.count)];
            claim.slot = s.count++;
            claim.weight = weight;
        }
    }
    Claim &at(std::size_t i) { return s.claims[i]; }
    std::uint64_t held() const {
        std::uint64_t sum = 0;
        for (int i = 0; i < s.count; ++i) sum += s.claims[static_cast<std::size_t>(i)].held();
        return sum;
    }

    bool lease(std::size_t i, std::uint64_t bytes) {
        Claim &claim = at(i);
        if (decide(s, static_cast<int>(i), bytes) == Verdict::grant) {
            claim.leased += bytes;
            claim.used += bytes;
            claim.demand = 0;
            ++wins[i];
            CHECK(held() <= s.capacity);
            return true;
        }
        if (!demand_alive(claim, s.now_ns)) {
            claim.ticket = ++tickets;
            claim.demand_since_ns = s.now_ns;
        }
        claim.demand = bytes;
        claim.demand_seen_ns = s.now_ns;
        return false;
    }

    // Pages end their work with this chance per tick; the tenant then obeys the ask before it uses them again.
    void turn(std::size_t i, double ending, std::uint64_t want) {
        Claim &claim = at(i);
        const auto pages = static_cast<double>(claim.used / kPage);
        const auto ended = static_cast<std::uint64_t>(std::poisson_distribution<int>(pages * ending)(random));
        const std::uint64_t bytes = std::min(claim.used, ended * kPage);
        claim.used -= bytes;
        claim.mapped_free += bytes;
        const Ask ask = asks(s)[i];
        const std::uint64_t wanted = ask.mapped_free + ask.as_freed;
        const std::uint64_t give = std::min(claim.mapped_free, (wanted + kPage - 1) / kPage * kPage);
        claim.mapped_free -= give;
        claim.leased -= give;
        claim.used += claim.mapped_free;
        claim.mapped_free = 0;
        for (int tries = 0; tries < 4 && lease(i, want); ++tries) {
        }
    }
    void run(std::uint64_t ticks, double ending, std::uint64_t want = kPage) {
        std::vector<std::size_t> order(wins.size());
        for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
        for (std::uint64_t tick = 0; tick < ticks; ++tick) {
            s.now_ns += kTick;
            std::shuffle(order.begin(), order.end(), random);
            for (const std::size_t i : order) turn(i, ending, want);
        }
    }
};

// 1 when everybody has the same part of what its weight entitles it to.
double jain(const std::vector<double> &parts) {
    double sum = 0;
    double squares = 0;
    for (const double part : parts) {
        sum += part;
        squares += part * part;
    }
    return sum * sum / (static_cast<double>(parts.size()) * squares);
}

void expect_weighted(const std::vector<std::uint32_t> &weights, std::uint64_t pages, std::uint64_t ticks) {
    Simulation sim(weights, pages);
    sim.at(0).leased = sim.s.capacity;  // one has everything, in use, when the others come
    sim.at(0).used = sim.s.capacity;
    sim.run(ticks, 0.02);
    double total = 0;
    for (const std::uint32_t weight : weights) total += weight;
    std::vector<double> parts;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const double part = static_cast<double>(sim.at(i).held()) / static_cast<double>(sim.s.capacity);
        parts.push_back(part * total / weights[i]);
    }
    for (std::size_t i = 0; i < parts.size(); ++i) {
        if (std::abs(parts[i] - 1) <= 0.05) continue;
        check::fail(__FILE__, __LINE__,
                    std::to_string(weights.size()) + " tenants: number " + std::to_string(i) + " has " +
                        std::to_string(parts[i]) + " of its share");
    }
    CHECK(jain(parts) >= 0.98);
    CHECK(sim.held() >= sim.s.capacity * 97 / 100);
}

}  // namespace

TEST("ledger simulation: four saturating tenants follow the weights 1:1:2:4 within 5 % after 2 s") {
    expect_weighted({1, 1, 2, 4}, 2048, 2000);
}

TEST("ledger simulation: 2 to 64 tenants follow their weights") {
    for (const std::size_t count : {2U, 3U, 8U, 24U, 64U}) {
        std::vector<std::uint32_t> weights;
        for (std::size_t i = 0; i < count; ++i) weights.push_back(1 + static_cast<std::uint32_t>(i * 7 % 4));
        expect_weighted(weights, 64 * count, 1000);
    }
}

TEST("ledger simulation: two equals and one page, 10,000 rounds") {
    Simulation sim({1, 1}, 1);
    sim.run(10'000, 0.5);
    const std::uint64_t sum = sim.wins[0] + sim.wins[1];
    CHECK(sum >= 3000);
    CHECK(sim.wins[0] * 10 >= sum * 3);
    CHECK(sim.wins[1] * 10 >= sum * 3);
}

TEST("ledger simulation: nobody starves, the light one among heavy ones included") {
    std::vector<std::uint32_t> weights(16, 1000);
    weights[7] = 1;
    Simulation sim(weights, 16);
    std::uint64_t longest = 0;
    std::uint64_t before = 0;
    std::uint64_t last = 0;
    for (std::uint64_t tick = 0; tick < 10'000; ++tick) {
        sim.run(1, 0.05);
        if (sim.wins[7] != before) last = tick;
        before = sim.wins[7];
        longest = std::max(longest, tick - last);
    }
    for (const std::uint64_t wins : sim.wins) CHECK(wins >= 5);
    CHECK(longest <= 2000);  // ticks: it ages after one second, and is first then
}

TEST("ledger simulation: a large request among small ones is met") {
    Simulation sim(std::vector<std::uint32_t>(9, 1), 256);
    for (std::size_t i = 0; i < 8; ++i) {
        sim.at(i).leased = sim.at(i).used = 32 * kPage;
    }
    std::uint64_t ticks = 0;
    while (!sim.lease(8, 64 * kPage)) {
        CHECK(++ticks < 4000);
        sim.s.now_ns += kTick;
        for (std::size_t i = 0; i < 8; ++i) sim.turn(i, 0.02, kPage);
    }
    CHECK(sim.held() <= sim.s.capacity);
}

#endif
