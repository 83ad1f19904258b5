// Leasing and giving, bells and asks: what a tenant's processes do all day.
#include "ledger/table_tenant.hpp"

#include <sched.h>

#include <algorithm>

#include "base/faultpoint.hpp"
#include "ledger/alive.hpp"
#include "ledger/clock.hpp"
#include "ledger/text.hpp"

namespace elastickv::ledger {

namespace {

constexpr std::uint64_t kProbeSliceUs = 20'000;  // how often a wait looks whether somebody died
constexpr std::uint64_t kExcessEveryNs = 10'000'000;

std::uint64_t get(const Word &word) noexcept { return word.load(std::memory_order_relaxed); }
void put(Word &word, std::uint64_t value) noexcept { word.store(value, std::memory_order_relaxed); }

// Takes away at most what is there: a count never wraps, whatever a caller gives twice.
void subtract(Word &word, std::uint64_t bytes) noexcept {
    std::uint64_t now = get(word);
    while (!word.compare_exchange_weak(now, now - std::min(now, bytes), std::memory_order_acq_rel)) {
    }
}

}  // namespace

TableTenant::TableTenant(std::shared_ptr<Ledger> owner, Table &table, std::unique_ptr<GuardedFd> fd, int slot,
                         int member, std::uint64_t incarnation) noexcept
    : owner_(std::move(owner)),
      table_(table),
      fd_(std::move(fd)),
      slot_(slot),
      member_(member),
      incarnation_(incarnation),
      epoch_(fork_epoch()) {}

TableTenant::~TableTenant() { leave(); }

void TableTenant::leave() noexcept {
    if (epoch_ != fork_epoch() || left_.exchange(true)) return;
    // Others of this process may be inside a call; each of them ends within the ledger's deadline.
    while (inside_.load() != 0) sched_yield();
    Result<TableGuard> guard = table_.lock("leaving the ledger");
    (void)fault::point("ledger.leave.locked");
    const bool gone = removed();  // the row may be another's by now
    if (!gone) {
        put(row().mapped[static_cast<std::size_t>(member_)], 0);
        put(row().static_used[static_cast<std::size_t>(member_)], 0);
    }
    unlock_byte(fd_->get(), alive_byte(slot_, member_));
    fd_->close();
    (void)fault::point("ledger.leave.unlocked");
    // Without the mutex the row stays as it is, and the next one who looks finds nobody behind it.
    if (guard.ok() && !gone && !slot_alive(table_.alive_fd(), slot_)) {
        table_.bury(slot_);
        futex_ring(table_.header().limits);
    }
    table_.ring_freed();
}

TableTenant::Entry::Entry(TableTenant &tenant) noexcept : tenant_(tenant) {
    tenant_.inside_.fetch_add(1);
    ours_ = tenant_.epoch_ == fork_epoch() && !tenant_.left_.load() && !tenant_.removed();
}

policy::Verdict TableTenant::decide(std::uint64_t bytes, policy::Snapshot &snapshot, std::uint64_t capacity,
                                    int &index) {
    snapshot = table_.snapshot(capacity);
    index = snapshot.find(slot_);
    if (index < 0) return policy::Verdict::capacity;
    policy::Verdict verdict = policy::decide(snapshot, index, bytes);
    if (verdict == policy::Verdict::grant || verdict == policy::Verdict::limit) return verdict;
    if (table_.reap() == 0) return verdict;  // nobody has died: the refusal stands
    snapshot = table_.snapshot(capacity);
    index = snapshot.find(slot_);
    return index < 0 ? policy::Verdict::capacity : policy::decide(snapshot, index, bytes);
}

Status TableTenant::take(Word &word, std::uint64_t bytes, bool ring, std::uint64_t backlog) {
    const Entry entry(*this);
    if (!entry.ours()) return not_ours();
    if (bytes == 0) return {};
    if (fault::point("ledger.lease.begin")) return {Code::unavailable, "an injected refusal; ask again later"};
    policy::Snapshot snapshot;
    policy::Verdict verdict = policy::Verdict::grant;
    {
        Result<TableGuard> guard = table_.lock("leasing");
        if (!guard.ok()) return guard.status();
        (void)fault::point("ledger.lease.locked");
        Result<std::uint64_t> capacity = table_.capacity();
        if (!capacity.ok()) return capacity.status();
        int index = -1;
        verdict = decide(bytes, snapshot, *capacity, index);
        if (index < 0) return not_ours();
        if (verdict == policy::Verdict::grant) {
            (void)fault::point("ledger.lease.decided");
            word.fetch_add(bytes, std::memory_order_acq_rel);
            (void)fault::point("ledger.lease.granted");
            put(row().active_ns, snapshot.now_ns);
            drop_demand();
            return {};
        }
        if (ring && verdict != policy::Verdict::limit) {
            record_demand(bytes, backlog, snapshot.now_ns);
            policy::Claim &own = snapshot.claims[static_cast<std::size_t>(index)];
            own.demand = bytes;
            own.backlog = get(row().backlog);
            own.demand_seen_ns = snapshot.now_ns;
            own.demand_since_ns = get(row().demand_since_ns);
            own.ticket = get(row().demand_ticket);
            note_asks(snapshot);
            (void)fault::point("ledger.lease.demanded");
        }
    }
    if (ring && verdict != policy::Verdict::limit) ring_others(snapshot);
    return refusal(verdict, snapshot, bytes);
}

Status TableTenant::not_ours() const {
    if (epoch_ != fork_epoch()) {
        return {Code::denied, "this tenant belongs to the parent process; a forked child must attach itself"};
    }
    if (!left_.load() && removed()) {
        return {Code::denied,
                "this tenant was removed from the ledger while it lived, for its lock was gone; what it "
                "holds is not counted any more: restart the engine"};
    }
    return {Code::denied, "this tenant has left the ledger; join again"};
}

Status TableTenant::refusal(policy::Verdict verdict, const policy::Snapshot &snapshot, std::uint64_t bytes) const {
    const std::string what = "no " + human_bytes(bytes) + " more for tenant '" + row().name.load() + "': ";
    const policy::Claim &own = snapshot.claims[static_cast<std::size_t>(snapshot.find(slot_))];
    if (verdict == policy::Verdict::limit) {
        return {Code::limit, what + "it holds " + human_bytes(own.held()) + " and its limit is " +
                                 human_bytes(own.limit) + "; raise the limit or free some"};
    }
    std::uint64_t held = 0;
    std::uint64_t promised = 0;
    for (int i = 0; i < snapshot.count; ++i) {
        const policy::Claim &claim = snapshot.claims[static_cast<std::size_t>(i)];
        held += claim.held();
        if (claim.slot != slot_ && claim.floor > claim.held()) promised += claim.floor - claim.held();
    }
    return {Code::unavailable, what + "of " + human_bytes(snapshot.capacity) + " on device '" + table_.device() +
                                   "' tenants hold " + human_bytes(held) + ", floors of others keep " +
                                   human_bytes(promised) + ", others use " + human_bytes(snapshot.unmanaged) +
                                   (verdict == policy::Verdict::waiting ? ", and tenants that wait come first" : "") +
                                   "; ask again later"};
}

void TableTenant::record_demand(std::uint64_t bytes, std::uint64_t backlog, std::uint64_t now) noexcept {
    Row &own = row();
    const std::uint64_t seen = get(own.demand_seen_ns);
    if (seen == 0 || get(own.demand) == 0 || now > seen + policy::kDemandLifetimeNs) {
        put(own.demand_seen_ns, 0);
        put(own.demand_ticket, table_.header().tickets.fetch_add(1, std::memory_order_relaxed) + 1);
        put(own.demand_since_ns, now);
    }
    put(own.demand, bytes);
    put(own.backlog, std::min(backlog, kMaxBytes));
    own.demand_seen_ns.store(now, std::memory_order_release);
    table_.header().demanders.fetch_or(std::uint64_t{1} << slot_, std::memory_order_release);
}

void TableTenant::withdraw_demand() noexcept {
    const Entry entry(*this);
    if (!entry.ours()) return;
    drop_demand();
}

void TableTenant::drop_demand() noexcept {
    if (get(row().demand_seen_ns) == 0) return;
    put(row().demand, 0);
    put(row().backlog, 0);
    // Below the floor this was only a part: others go on giving for a while, whenever they look.
    if (leased() + static_bytes() < floor()) return;
    put(row().demand_seen_ns, 0);
    table_.header().demanders.fetch_and(~(std::uint64_t{1} << slot_), std::memory_order_relaxed);
}

// Starts the clock of those who are asked for something now, and counts those who let theirs run out.
void TableTenant::note_asks(const policy::Snapshot &snapshot) noexcept {
    const policy::Asks asked = policy::asks(snapshot);
    for (int i = 0; i < snapshot.count; ++i) {
        const policy::Claim &claim = snapshot.claims[static_cast<std::size_t>(i)];
        if (claim.slot == slot_) continue;
        Row &other = table_.row(claim.slot);
        const Ask &ask = asked[static_cast<std::size_t>(i)];
        if (claim.ask_open_ns == 0) {
            if (ask.mapped_free + ask.cached == 0) continue;
            put(other.ask_open_ns, snapshot.now_ns);
            other.asked.fetch_add(1, std::memory_order_relaxed);
        } else if (snapshot.now_ns > claim.ask_open_ns + policy::kAnswerNs &&
                   other.ask_late_ns.exchange(claim.ask_open_ns, std::memory_order_relaxed) != claim.ask_open_ns) {
            other.late.fetch_add(1, std::memory_order_relaxed);
        }
    }
}

// Everybody is rung, also those of whom the published figures show nothing to give: figures may be behind.
void TableTenant::ring_others(const policy::Snapshot &snapshot) noexcept {
    for (int i = 0; i < snapshot.count; ++i) {
        const int other = snapshot.claims[static_cast<std::size_t>(i)].slot;
        if (other != slot_) futex_ring(table_.row(other).bell);
    }
}

void TableTenant::answered() noexcept {
    const Entry entry(*this);
    if (!entry.ours()) return;
    const std::uint64_t since = row().ask_open_ns.exchange(0, std::memory_order_relaxed);
    if (since == 0) return;
    row().answered.fetch_add(1, std::memory_order_relaxed);
    if (now_ns() > since + policy::kAnswerNs && row().ask_late_ns.exchange(since, std::memory_order_relaxed) != since) {
        row().late.fetch_add(1, std::memory_order_relaxed);
    }
}

void TableTenant::give_back(Word &word, std::uint64_t bytes) noexcept {
    const Entry entry(*this);
    if (!entry.ours() || bytes == 0) return;
    (void)fault::point("ledger.give.begin");
    subtract(word, bytes);
    (void)fault::point("ledger.give.done");
    table_.ring_freed();
}

std::uint32_t TableTenant::freed_word() const noexcept { return table_.header().freed.load(std::memory_order_acquire); }

std::uint32_t TableTenant::wait_freed(std::uint32_t seen, std::uint64_t timeout_us) noexcept {
    const std::uint64_t until = now_ns() + timeout_us * 1000;
    while (true) {
        const std::uint64_t start = now_ns();
        if (start >= until) return freed_word();
        const std::uint64_t slice = std::min((until - start) / 1000 + 1, kProbeSliceUs);
        if (freed_word() == seen) futex_wait(table_.header().freed, seen, slice);
        const std::uint32_t word = freed_word();
        if (word != seen) return word;
        if (table_.anybody_died()) {
            Result<TableGuard> guard = table_.lock("looking for the dead");
            if (guard.ok()) table_.reap();
            return freed_word();
        }
        if (now_ns() < start + slice * 1000) return word;  // a signal: the caller may have something to do
    }
}

std::uint32_t TableTenant::bell_word() const noexcept { return row().bell.load(std::memory_order_acquire); }

std::uint32_t TableTenant::wait_bell(std::uint32_t seen, std::uint64_t timeout_us) noexcept {
    if (bell_word() == seen && timeout_us > 0) futex_wait(row().bell, seen, timeout_us);
    return bell_word();
}

Ask TableTenant::ask() {
    const Entry entry(*this);
    if (!entry.ours()) return {};
    Result<TableGuard> guard = table_.lock("reading what is asked");
    if (!guard.ok()) return {};
    Result<std::uint64_t> capacity = table_.capacity();
    if (!capacity.ok()) return {};
    policy::Snapshot snapshot = table_.snapshot(*capacity);
    const int index = snapshot.find(slot_);
    if (index < 0) return {};
    snapshot.claims[static_cast<std::size_t>(index)].ask_open_ns = 0;  // late perhaps, but here it is
    return policy::asks(snapshot)[static_cast<std::size_t>(index)];
}

// Looked at every few milliseconds only: it reads every row, and outsiders are measured twice a second.
bool TableTenant::excess() noexcept {
    const std::uint64_t now = coarse_ns();
    if (now >= excess_again_ns_.load(std::memory_order_relaxed)) {
        excess_again_ns_.store(now + kExcessEveryNs, std::memory_order_relaxed);
        excess_.store(table_.over_capacity(), std::memory_order_relaxed);
    }
    return excess_.load(std::memory_order_relaxed);
}

bool TableTenant::pressed() noexcept {
    const Entry entry(*this);
    if (!entry.ours()) return false;
    // Also when whoever asked has been served meanwhile: unanswered, it would stand as one that was passed over.
    if (get(row().ask_open_ns) != 0) return true;
    const std::uint64_t waiting = get(table_.header().demanders) & ~(std::uint64_t{1} << slot_);
    if (waiting != 0) {
        policy::Claim claim;
        claim.demand = 1;
        const std::uint64_t now = now_ns();
        for (int slot = 0; slot < kMaxTenants; ++slot) {
            if ((waiting >> slot & 1) == 0) continue;
            claim.demand_seen_ns = get(table_.row(slot).demand_seen_ns);
            if (policy::demand_alive(claim, now)) return true;
        }
    }
    return limit_wanted().revision != limit_held().revision || trim_wanted().revision != trim_done().revision ||
           excess();
}

void TableTenant::acknowledge_limit(const Limit &limit) noexcept {
    const Entry entry(*this);
    if (!entry.ours()) return;
    {
        Result<TableGuard> guard = table_.lock("acknowledging a limit");
        if (!guard.ok()) return;  // stays open: pressed() goes on saying so
        const Limit wanted = limit_wanted();
        if (limit.revision <= limit_held().revision || limit.revision > wanted.revision) return;
        // Whoever says so: a limit that is to hold now is not kept by one who holds more.
        if (limit.revision == wanted.revision && wanted.now && leased() + static_bytes() > wanted.bytes) return;
        row().limit_held.store(limit);
        (void)fault::point("ledger.limit.held");
    }
    futex_ring(table_.header().limits);
}

Tenant::Trim TableTenant::as_trim(const Revised &order) noexcept {
    const Limit pair = order.load();
    return {pair.bytes, pair.revision};
}

void TableTenant::acknowledge_trim(const Trim &given) noexcept {
    const Entry entry(*this);
    if (!entry.ours()) return;
    {
        Result<TableGuard> guard = table_.lock("acknowledging a trim");
        if (!guard.ok()) return;  // stays open: pressed() goes on saying so
        if (given.revision <= trim_done().revision || given.revision > trim_wanted().revision) return;
        row().trim_done.store({given.bytes, given.revision, false});
        (void)fault::point("ledger.trim.done");
    }
    futex_ring(table_.header().limits);
}

std::uint64_t TableTenant::leased() const noexcept { return row().leased.load(std::memory_order_acquire); }
std::uint64_t TableTenant::static_bytes() const noexcept { return row().static_bytes.load(std::memory_order_acquire); }
std::uint64_t TableTenant::floor() const noexcept { return get(row().floor); }

std::uint64_t TableTenant::by_policy(std::uint64_t (*figure)(const policy::Snapshot &, int) noexcept) {
    const Entry entry(*this);
    if (!entry.ours()) return 0;
    Result<TableGuard> guard = table_.lock("reading what could be leased");
    if (!guard.ok()) return 0;
    table_.reap();
    Result<std::uint64_t> capacity = table_.capacity();
    if (!capacity.ok()) return 0;
    const policy::Snapshot snapshot = table_.snapshot(*capacity);
    const int index = snapshot.find(slot_);
    return index < 0 ? 0 : figure(snapshot, index);
}

void TableTenant::publish(const Usage &usage, const Counters &counters) noexcept {
    const Entry entry(*this);
    if (!entry.ours()) return;
    Row &own = row();
    put(own.virtual_bytes, usage.virtual_bytes);
    put(own.used, usage.used);
    put(own.cached, usage.cached);
    put(own.mapped_free, usage.mapped_free);
    put(own.transit, usage.transit);
    put(own.leaving, usage.leaving);
    put(own.pinned, usage.pinned);
    put(own.misses, counters.misses);
    put(own.evicted_need, counters.evicted_need);
    put(own.evicted_neighbour, counters.evicted_neighbour);
    put(own.evicted_limit, counters.evicted_limit);
    put(own.evicted_idle, counters.evicted_idle);
    put(own.evicted_budget, counters.evicted_budget);
    if (usage.working) put(own.active_ns, now_ns());
}

void TableTenant::add_mapped(std::int64_t bytes) noexcept {
    const Entry entry(*this);
    if (!entry.ours()) return;
    Word &mapped = row().mapped[static_cast<std::size_t>(member_)];
    if (bytes >= 0) {
        mapped.fetch_add(static_cast<std::uint64_t>(bytes), std::memory_order_relaxed);
    } else {
        subtract(mapped, static_cast<std::uint64_t>(-bytes));
    }
}

void TableTenant::publish_static_used(std::uint64_t bytes) noexcept {
    const Entry entry(*this);
    if (entry.ours()) put(row().static_used[static_cast<std::size_t>(member_)], bytes);
}

void TableTenant::observe(Latency what, std::uint64_t ns) noexcept {
    const Entry entry(*this);
    if (entry.ours()) row().latencies[static_cast<std::size_t>(what)].add(ns);
}

// Under the lock, so that no reader finds half a text. Without it (a holder that is stuck) nothing is changed.
void TableTenant::describe(const Description &description) noexcept {
    const Entry entry(*this);
    if (!entry.ours()) return;
    const Result<TableGuard> guard = table_.lock("describing a tenant");
    if (!guard.ok()) return;
    if (description.engine) row().engine.store(*description.engine);
    if (description.layout) row().layout.store(*description.layout);
    if (description.page_bytes) put(row().page_bytes, *description.page_bytes);
}

}  // namespace elastickv::ledger
