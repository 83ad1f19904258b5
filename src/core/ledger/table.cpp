// Table: the mutex, the dead, the snapshot.
#include "ledger/table.hpp"

#include <pthread.h>
#include <sched.h>

#include <cerrno>

#include "base/faultpoint.hpp"
#include "ledger/alive.hpp"
#include "ledger/clock.hpp"
#include "ledger/text.hpp"

namespace elastickv::ledger {

namespace {
std::uint64_t get(const Word &word) noexcept { return word.load(std::memory_order_relaxed); }

int lock_until(pthread_mutex_t *mutex, std::uint64_t until_ns) noexcept {
#if defined(__SANITIZE_THREAD__)
    // gcc 12's thread sanitizer does not know pthread_mutex_clocklock and would report every unlock after it.
    while (true) {
        const int error = pthread_mutex_trylock(mutex);
        if (error != EBUSY) return error;
        if (now_ns() >= until_ns) return ETIMEDOUT;
        sched_yield();
    }
#else
    const timespec until = to_timespec(until_ns);
    return pthread_mutex_clocklock(mutex, CLOCK_MONOTONIC, &until);
#endif
}

// Bytes of the trim that was ordered and not answered; 0: none.
std::uint64_t open_trim(const Row &row) noexcept {
    const Tenant::Limit wanted = row.trim_wanted.load();
    return wanted.revision == row.trim_done.load().revision ? 0 : wanted.bytes;
}

std::uint64_t amount(const Word &word) noexcept { return std::min(get(word), kMaxBytes); }
}  // namespace

TableGuard::~TableGuard() {
    if (table_ == nullptr) return;
    table_->header().owner_pid.store(0, std::memory_order_relaxed);
    (void)fault::point("ledger.lock.release");
    pthread_mutex_unlock(&table_->header().mutex);
}

Result<TableGuard> Table::lock(const char *doing) {
    pthread_mutex_t *mutex = &header().mutex;
    int error = fault::point("ledger.lock.wait") ? ETIMEDOUT : pthread_mutex_trylock(mutex);
    if (error == EBUSY) error = lock_until(mutex, now_ns() + deadline_ms_ * 1'000'000);
    if (error == ETIMEDOUT) {
        const std::uint64_t pid = get(header().owner_pid);
        return Status{Code::timeout, std::string(doing) + ": the lock of ledger '" + path_ + "' was not free within " +
                                         human_ms(deadline_ms_) + "; taken last by process " +
                                         (pid == 0 ? std::string("(unknown)") : std::to_string(pid)) +
                                         ": is it stopped? Continue it or end it"};
    }
    if (error != 0 && error != EOWNERDEAD) {
        return system_error(std::string(doing) + ": cannot lock ledger '" + path_ + "'", error);
    }
    // At once: there is nothing to undo (see repair), and a second death in here would only bring the next one here.
    if (error == EOWNERDEAD) pthread_mutex_consistent(mutex);
    TableGuard guard{*this};
    (void)fault::point("ledger.lock.taken");
    header().owner_pid.store(own_pid(), std::memory_order_relaxed);
    if (error == EOWNERDEAD) repair();
    return guard;
}

// The owner died inside. Every write is a single word that means something by itself, so there is nothing to undo:
// its own row goes with the dead, and what else it was changing is either done or not.
void Table::repair() {
    (void)fault::point("ledger.lock.repair");
    header().repairs.fetch_add(1, std::memory_order_relaxed);
    reap();
    for (int slot = 0; slot < kMaxTenants; ++slot) {
        Row &one = row(slot);
        if (get(one.named) != 0 && !lives(slot) && !valid_tenant_name(one.name.load()))
            one.named.store(0, std::memory_order_relaxed);
        if (lives(slot) && (get(one.weight) < 1 || get(one.weight) > 1000))
            one.weight.store(1, std::memory_order_relaxed);
    }
    ring_freed();
}

Result<std::uint64_t> Table::capacity() {
    std::uint64_t bytes = 0;
    if (unpack_capacity(header().capacity.load(std::memory_order_acquire), bytes)) return bytes;
    return Status{Code::corrupt, "'" + path_ +
                                     "' has a damaged capacity word; stop the engines that use this device "
                                     "and remove the file"};
}

void Table::bury(int slot) {
    Row &one = row(slot);
    clear_life(one);
    one.left_ns.store(now_ns(), std::memory_order_relaxed);
    header().demanders.fetch_and(~(std::uint64_t{1} << slot), std::memory_order_relaxed);
    header().revision.fetch_add(1, std::memory_order_relaxed);
    (void)fault::point("ledger.bury.cleared");
    forget_made_up(one);
}

// The name of a tenant that is gone and that nobody will take up again. Under the lock.
void Table::forget_made_up(Row &row) noexcept {
    if (get(row.named) == static_cast<std::uint64_t>(Naming::this_life)) {
        row.named.store(static_cast<std::uint64_t>(Naming::none), std::memory_order_relaxed);
    }
}

int Table::reap() {
    int buried = 0;
    for (int slot = 0; slot < kMaxTenants; ++slot) {
        if (!lives(slot)) {
            forget_made_up(row(slot));  // who buried it, or was to become it, may have died at that
            continue;
        }
        if (!slot_alive(alive_.get(), slot)) {
            bury(slot);
            ++buried;
            continue;
        }
        for (int member = 0; member < kMaxMembers; ++member) {
            Word &mapped = row(slot).mapped[static_cast<std::size_t>(member)];
            Word &fixed = row(slot).static_used[static_cast<std::size_t>(member)];
            if (get(mapped) + get(fixed) == 0 || member_alive(alive_.get(), slot, member)) continue;
            mapped.store(0, std::memory_order_relaxed);
            fixed.store(0, std::memory_order_relaxed);
        }
    }
    if (buried > 0) {
        ring_freed();
        futex_ring(header().limits);
    }
    return buried;
}

bool Table::anybody_died() noexcept {
    for (int slot = 0; slot < kMaxTenants; ++slot) {
        if (lives(slot) && !slot_alive(alive_.get(), slot)) return true;
    }
    return false;
}

bool Table::over_capacity() noexcept {
    const Result<std::uint64_t> bound = capacity();
    if (!bound.ok()) return false;
    std::uint64_t held = amount(header().unmanaged);
    for (int slot = 0; slot < kMaxTenants; ++slot) {
        if (lives(slot)) held += amount(row(slot).leased) + amount(row(slot).static_bytes);
    }
    return held > bound.value();
}

// A device that hangs lets go of nothing. A look long after the last one begins anew: it may be another departure.
bool Table::Leaving::stalled(std::uint64_t now_leaving, std::uint64_t now_ns) noexcept {
    if (bytes == 0 || now_leaving < bytes || now_ns > looked_ns + policy::kAgeingNs) since_ns = now_ns;
    bytes = now_leaving;
    looked_ns = now_ns;
    return bytes != 0 && now_ns > since_ns + policy::kStalledNs;
}

policy::Snapshot Table::snapshot(std::uint64_t capacity) {
    policy::Snapshot snapshot;
    snapshot.now_ns = now_ns();
    snapshot.capacity = capacity;
    snapshot.unmanaged = amount(header().unmanaged);
    for (int slot = 0; slot < kMaxTenants; ++slot) {
        if (!lives(slot)) continue;
        Row &one = row(slot);
        policy::Claim &claim = snapshot.claims[static_cast<std::size_t>(snapshot.count++)];
        claim.slot = slot;
        claim.floor = amount(one.floor);
        const Tenant::Limit limit = one.limit_wanted.load();
        claim.limit = limit.bytes;
        claim.limit_now = limit.now;
        claim.trim = open_trim(one);
        claim.leased = amount(one.leased);
        claim.static_bytes = amount(one.static_bytes);
        claim.weight = static_cast<std::uint32_t>(get(one.weight));
        claim.priority = static_cast<std::int32_t>(get(one.priority));
        claim.demand = amount(one.demand);
        claim.backlog = amount(one.backlog);
        claim.ticket = get(one.demand_ticket);
        claim.demand_since_ns = get(one.demand_since_ns);
        claim.demand_seen_ns = get(one.demand_seen_ns);
        claim.used = amount(one.used);
        claim.cached = amount(one.cached);
        claim.leaving = amount(one.leaving);
        claim.stalled = leaving_[static_cast<std::size_t>(slot)].stalled(claim.leaving, snapshot.now_ns);
        claim.mapped_free = amount(one.mapped_free);
        claim.active_ns = get(one.active_ns);
        claim.ask_open_ns = get(one.ask_open_ns);
        const std::uint64_t bit = std::uint64_t{1} << slot;
        if ((get(header().demanders) & bit) != 0 && !policy::demand_alive(claim, snapshot.now_ns)) {
            header().demanders.fetch_and(~bit, std::memory_order_relaxed);
        }
    }
    return snapshot;
}

int Table::find_name(const std::string &name) {
    for (int slot = 0; slot < kMaxTenants; ++slot) {
        if (get(row(slot).named) != 0 && row(slot).name.load() == name) return slot;
    }
    return -1;
}

}  // namespace elastickv::ledger
