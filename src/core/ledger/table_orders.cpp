// What an operator orders of a tenant, and the wait for its answer.
#include <algorithm>

#include "base/faultpoint.hpp"
#include "ledger/clock.hpp"
#include "ledger/table_ledger.hpp"
#include "ledger/text.hpp"

namespace elastickv::ledger {

namespace {

constexpr std::uint64_t kProbeSliceUs = 20'000;  // how often a wait looks whether somebody died

std::uint64_t get(const Word &word) noexcept { return word.load(std::memory_order_relaxed); }

// What the engine cannot give back however many requests are preempted.
Status beneath_least(const std::string &name, std::uint64_t bytes, const Row &row) {
    const std::uint64_t fixed = get(row.static_bytes), pinned = get(row.pinned);
    return {Code::invalid, "tenant '" + name + "': a limit of " + human_bytes(bytes) + " cannot be held now: " +
                               human_bytes(fixed + pinned) + " stay while its engine runs (weights and the like " +
                               human_bytes(fixed) + ", first block of the cache " + human_bytes(pinned) +
                               "); give at least that, do not ask for it now, or stop the engine"};
}

std::string limit_text(std::uint64_t bytes) { return bytes == kNoLimit ? "no limit" : human_bytes(bytes); }

}  // namespace

Result<std::uint64_t> TableLedger::order_limit(const std::string &name, std::uint64_t bytes, bool now) {
    std::uint64_t revision = 0;
    int slot = -1;
    {
        Result<TableGuard> guard = table_->lock("ordering a limit");
        if (!guard.ok()) return guard.status();
        table_->reap();
        slot = table_->find_name(name);
        if (slot < 0) return unknown_name(name);
        Row &row = table_->row(slot);
        if (table_->lives(slot) && bytes < get(row.floor)) {
            return Status{Code::invalid, "tenant '" + name + "': a limit of " + human_bytes(bytes) +
                                             " is under its floor of " + human_bytes(get(row.floor)) +
                                             "; give a larger one, or restart it with a lower floor"};
        }
        if (now && table_->lives(slot) && bytes < get(row.static_bytes) + get(row.pinned))
            return beneath_least(name, bytes, row);
        revision = table_->header().revision.fetch_add(1, std::memory_order_relaxed) + 1;
        row.limit_wanted.store({bytes, revision, now});
        (void)fault::point("ledger.limit.ordered");
    }
    futex_ring(table_->row(slot).bell);
    table_->ring_freed();  // a raised limit lets its waiters go on
    return revision;
}

Result<std::uint64_t> TableLedger::order_trim(const std::string &name, std::uint64_t bytes) {
    if (bytes == 0) {
        return Status{Code::invalid, "tenant '" + name + "': a trim of no bytes asks for nothing; say how many"};
    }
    std::uint64_t revision = 0;
    int slot = -1;
    {
        Result<TableGuard> guard = table_->lock("ordering a trim");
        if (!guard.ok()) return guard.status();
        table_->reap();
        slot = table_->find_name(name);
        if (slot < 0) return unknown_name(name);
        if (!table_->lives(slot)) {
            return Status{Code::not_found, "tenant '" + name + "' does not run, so it has nothing to give back"};
        }
        revision = table_->header().revision.fetch_add(1, std::memory_order_relaxed) + 1;
        table_->row(slot).trim_wanted.store({bytes, revision, false});
        (void)fault::point("ledger.trim.ordered");
    }
    futex_ring(table_->row(slot).bell);
    return revision;
}

Status TableLedger::wait_answer(const std::string &name, std::uint64_t timeout_ms,
                                const std::function<bool()> &interrupted, const Look &look,
                                const std::function<std::string()> &late) {
    const std::uint64_t until = now_ns() + timeout_ms * 1'000'000;
    while (true) {
        const std::uint32_t seen = table_->header().limits.load(std::memory_order_acquire);
        {
            Result<TableGuard> guard = table_->lock("waiting for a tenant's answer");
            if (!guard.ok()) return guard.status();
            table_->reap();
            const int slot = table_->find_name(name);
            if (slot < 0) return unknown_name(name);
            Result<bool> answered = look(slot);
            if (!answered.ok()) return answered.status();
            if (*answered) return {};
        }
        const std::uint64_t now = now_ns();
        if (now >= until) return {Code::timeout, "tenant '" + name + "' " + late()};
        if (interrupted && interrupted()) return {Code::timeout, "waiting for tenant '" + name + "' was interrupted"};
        futex_wait(table_->header().limits, seen, std::min((until - now) / 1000 + 1, kProbeSliceUs));
    }
}

Status TableLedger::wait_limit(const std::string &name, std::uint64_t revision, std::uint64_t timeout_ms,
                               const std::function<bool()> &interrupted) {
    Tenant::Limit held;
    Tenant::Limit wanted;
    std::uint64_t holds = 0;
    const Look look = [&](int slot) -> Result<bool> {
        Row &row = table_->row(slot);
        wanted = row.limit_wanted.load();
        if (wanted.revision < revision) {
            return Status{Code::invalid, "tenant '" + name + "': revision " + std::to_string(revision) +
                                             " of its limit was never ordered; the last one is " +
                                             std::to_string(wanted.revision)};
        }
        if (!table_->lives(slot)) {
            return Status{Code::not_found, "tenant '" + name +
                                               "' does not run, so nobody can acknowledge its limit; the limit is "
                                               "kept and holds when it starts"};
        }
        held = row.limit_held.load();
        holds = get(row.leased) + get(row.static_bytes);
        return held.revision >= revision;
    };
    return wait_answer(name, timeout_ms, interrupted, look, [&] {
        const std::string late = "did not acknowledge revision " + std::to_string(revision) + " of its limit within " +
                                 human_ms(timeout_ms) + "; it holds revision " + std::to_string(held.revision) + " (" +
                                 limit_text(held.bytes) + "). No new lease goes above the new limit";
        if (wanted.now && holds > wanted.bytes)
            return late + "; it still has " + human_bytes(holds) + ", running requests included";
        return late + "; is the engine stuck?";
    });
}

Result<std::uint64_t> TableLedger::wait_trim(const std::string &name, std::uint64_t revision, std::uint64_t timeout_ms,
                                             const std::function<bool()> &interrupted) {
    Tenant::Limit done;
    const Look look = [&](int slot) -> Result<bool> {
        const std::string order = "revision " + std::to_string(revision) + " of a trim";
        if (revision > get(table_->header().revision)) {
            return Status{Code::invalid, "tenant '" + name + "': " + order + " was never ordered"};
        }
        Row &row = table_->row(slot);
        if (!table_->lives(slot) || row.trim_wanted.load().revision < revision) {
            return Status{Code::not_found, "tenant '" + name + "' has ended since, and " + order + " with it"};
        }
        done = row.trim_done.load();
        return done.revision >= revision;
    };
    const Status status = wait_answer(name, timeout_ms, interrupted, look, [&] {
        return "did not answer a trim within " + human_ms(timeout_ms) +
               "; it stays ordered and is done once the tenant looks. Is the engine stuck?";
    });
    if (!status.ok()) return status;
    return done.bytes;
}

}  // namespace elastickv::ledger
