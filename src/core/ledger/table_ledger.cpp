// Joining, attaching, and what an operator asks of a ledger.
#include "ledger/table_ledger.hpp"

#include <fcntl.h>

#include <algorithm>

#include "base/faultpoint.hpp"
#include "ledger/alive.hpp"
#include "ledger/clock.hpp"
#include "ledger/table_tenant.hpp"
#include "ledger/text.hpp"

namespace elastickv {

Result<std::shared_ptr<Ledger>> Ledger::open(const LedgerOptions &options) {
    Result<std::unique_ptr<ledger::Table>> table = ledger::Table::open(options);
    if (!table.ok()) return table.status();
    auto made = std::make_shared<ledger::TableLedger>(std::move(table).value(), options.capacity);
    if (Status status = made->settle_capacity(); !status.ok()) return status;
    return std::shared_ptr<Ledger>(std::move(made));
}

namespace ledger {

namespace {

std::uint64_t get(const Word &word) noexcept { return word.load(std::memory_order_relaxed); }
void put(Word &word, std::uint64_t value) noexcept { word.store(value, std::memory_order_relaxed); }

Status check_options(const TenantOptions &options) {
    if (!valid_tenant_name(options.name)) {
        return {Code::invalid, "'" + options.name + "' is no tenant name: 1 to 63 of A-Z a-z 0-9 . _ -"};
    }
    if (options.weight < 1 || options.weight > 1000) {
        return {Code::invalid,
                "tenant '" + options.name + "': weight " + std::to_string(options.weight) + " is outside 1 to 1000"};
    }
    if (options.floor >= kMaxBytes) {
        return {Code::invalid, "tenant '" + options.name + "': a floor of " + human_bytes(options.floor) +
                                   " is above the ledger's " + human_bytes(kMaxBytes)};
    }
    return {};
}

// A descriptor of its own for every member: the lock belongs to the description.
Result<std::unique_ptr<GuardedFd>> open_alive(const Table &table) {
    Result<UniqueFd> fd = table.directory().open_file(table.alive_name());
    if (!fd.ok()) return fd.status();
    return std::make_unique<GuardedFd>(fd->take());
}

TenantView view_row(Row &row, int slot, std::uint64_t now) {
    TenantView view;
    view.slot = slot;
    view.name = row.name.load();
    view.engine = row.engine.load();
    view.layout = row.layout.load();
    view.incarnation = get(row.incarnation);
    view.alive = view.incarnation != 0;
    const Tenant::Limit wanted = row.limit_wanted.load();
    view.limit_wanted = wanted.bytes;
    view.limit_wanted_rev = wanted.revision;
    view.limit_now = wanted.now;
    const Tenant::Limit held = row.limit_held.load();
    view.limit_held = held.bytes;
    view.limit_held_rev = held.revision;
    view.weight = static_cast<std::uint32_t>(get(row.weight));
    view.priority = static_cast<std::int32_t>(get(row.priority));
    view.page_bytes = get(row.page_bytes);
    view.since_unix_ns = get(row.since_unix_ns);
    if (!view.alive) return view;
    view.pid = static_cast<std::int64_t>(get(row.pid));
    view.floor = get(row.floor);
    view.leased = get(row.leased);
    view.static_bytes = get(row.static_bytes);
    for (const Word &mapped : row.mapped) view.mapped += get(mapped);
    for (const Word &used : row.static_used) view.static_used += get(used);
    const Tenant::Limit trim = row.trim_wanted.load();
    view.trim_wanted = trim.revision == row.trim_done.load().revision ? 0 : trim.bytes;
    policy::Claim claim;
    claim.demand = get(row.demand);
    claim.demand_seen_ns = get(row.demand_seen_ns);
    if (policy::demand_alive(claim, now)) {
        view.demand = claim.demand;
        view.backlog = get(row.backlog);
        view.demand_ticket = get(row.demand_ticket);
        view.demand_age_ns = now - std::min(now, get(row.demand_since_ns));
    }
    view.usage = {get(row.virtual_bytes), get(row.used),    get(row.cached), get(row.mapped_free),
                  get(row.transit),       get(row.leaving), get(row.pinned)};
    view.counters = {get(row.misses),        get(row.evicted_need), get(row.evicted_neighbour),
                     get(row.evicted_limit), get(row.evicted_idle), get(row.evicted_budget),
                     get(row.asked),         get(row.answered),     get(row.late)};
    for (std::size_t i = 0; i < kLatencies; ++i) view.histograms[i] = row.latencies[i].load();
    return view;
}

}  // namespace

Status TableLedger::settle_capacity() {
    if (wanted_capacity_ == 0) return {};
    Result<TableGuard> guard = table_->lock("opening a ledger");
    if (!guard.ok()) return guard.status();
    return settle_capacity_locked();
}

Status TableLedger::settle_capacity_locked() {
    Result<std::uint64_t> capacity = table_->capacity();
    if (!capacity.ok()) return capacity.status();
    if (wanted_capacity_ == 0 || *capacity == wanted_capacity_) return {};
    table_->reap();
    if (const std::string names = living_names(); !names.empty()) {
        return {Code::exists, "device '" + table_->device() + "' is shared at a capacity of " + human_bytes(*capacity) +
                                  " by the tenants that run now (" + names + "), and " + human_bytes(wanted_capacity_) +
                                  " was asked for; use the same capacity, or stop them first"};
    }
    table_->header().capacity.store(pack_capacity(wanted_capacity_), std::memory_order_release);
    return {};
}

std::string TableLedger::living_names() {
    std::string names;
    for (int slot = 0; slot < kMaxTenants; ++slot) {
        if (table_->lives(slot)) names += (names.empty() ? "" : ", ") + table_->row(slot).name.load();
    }
    return names;
}

Result<int> TableLedger::choose_slot(const std::string &name) {
    if (const int slot = table_->find_name(name); slot >= 0) {
        if (!table_->lives(slot)) return slot;
        return Status{Code::exists, "a tenant named '" + name + "' runs on device '" + table_->device() +
                                        "' (started by process " + std::to_string(get(table_->row(slot).pid)) +
                                        "); stop it or take another name"};
    }
    int oldest = -1;
    for (int slot = 0; slot < kMaxTenants; ++slot) {
        if (table_->lives(slot)) continue;
        if (get(table_->row(slot).named) == 0) return slot;
        if (oldest < 0 || get(table_->row(slot).left_ns) < get(table_->row(oldest).left_ns)) oldest = slot;
    }
    if (oldest >= 0) return oldest;
    return Status{Code::exists, "all " + std::to_string(kMaxTenants) + " places on device '" + table_->device() +
                                    "' are taken by tenants that run; stop one before starting '" + name + "'"};
}

Status TableLedger::check_floor(const TenantOptions &options, int slot) {
    Result<std::uint64_t> capacity = table_->capacity();
    if (!capacity.ok()) return capacity.status();
    const std::string who = "tenant '" + options.name + "': the floor of " + human_bytes(options.floor) + " is above ";
    const bool kept = get(table_->row(slot).named) != 0 && table_->row(slot).name.load() == options.name;
    const std::uint64_t limit =
        options.set_limit ? options.limit : (kept ? table_->row(slot).limit_wanted.load().bytes : kNoLimit);
    if (options.floor > limit) {
        return {Code::invalid, who + "its limit of " + human_bytes(limit) +
                                   (options.set_limit ? "" : ", which the ledger keeps from before") +
                                   "; lower the floor or raise the limit"};
    }
    std::uint64_t promised = std::min(get(table_->header().unmanaged), kMaxBytes);
    for (int other = 0; other < kMaxTenants; ++other) {
        if (!table_->lives(other)) continue;
        promised += std::max(std::min(get(table_->row(other).floor), kMaxBytes),
                             std::min(get(table_->row(other).static_bytes), kMaxBytes));
    }
    const std::uint64_t left = *capacity > promised ? *capacity - promised : 0;
    if (options.floor > left) {
        return {Code::invalid, who + "what others leave of device '" + table_->device() + "': " + human_bytes(left) +
                                   " of " + human_bytes(*capacity) + ", after their floors and static bytes (" +
                                   human_bytes(promised) + "); lower the floor or stop one of: " + living_names()};
    }
    return {};
}

// The byte is locked before this. A death before the last line leaves a row that says "nobody".
std::uint64_t TableLedger::write_row(const TenantOptions &options, int slot) {
    Row &row = table_->row(slot);
    Header &header = table_->header();
    clear_life(row);
    if (get(row.named) == 0 || row.name.load() != options.name) {
        put(row.named, 0);
        row.limit_wanted.store({kNoLimit, 0, false});
        row.name.store(options.name);
    }
    row.named.store(static_cast<std::uint64_t>(options.lasting ? Naming::lasting : Naming::this_life),
                    std::memory_order_release);
    (void)fault::point("ledger.join.named");
    row.engine.store(options.engine);
    row.layout.store(options.layout);
    put(row.pid, own_pid());
    put(row.since_unix_ns, unix_ns());
    put(row.floor, options.floor);
    put(row.weight, options.weight);
    put(row.priority, static_cast<std::uint64_t>(static_cast<std::int64_t>(options.priority)));
    put(row.page_bytes, options.page_bytes);
    put(row.active_ns, now_ns());
    const std::uint64_t revision = header.revision.fetch_add(1, std::memory_order_relaxed) + 1;
    if (options.set_limit) row.limit_wanted.store({options.limit, revision, false});
    row.limit_held.store(row.limit_wanted.load());  // it holds nothing yet, so any limit is kept
    const std::uint64_t incarnation = header.incarnations.fetch_add(1, std::memory_order_relaxed) + 1;
    (void)fault::point("ledger.join.written");
    row.incarnation.store(incarnation, std::memory_order_release);
    (void)fault::point("ledger.join.done");
    return incarnation;
}

Result<std::unique_ptr<Tenant>> TableLedger::join(const TenantOptions &options) {
    if (Status status = check_options(options); !status.ok()) return status;
    Result<std::unique_ptr<GuardedFd>> fd = open_alive(*table_);
    if (!fd.ok()) return fd.status();
    Result<TableGuard> guard = table_->lock("joining as a tenant");
    if (!guard.ok()) return guard.status();
    if (Status status = table_->check_current(); !status.ok()) return status;
    table_->reap();
    if (Status status = settle_capacity_locked(); !status.ok()) return status;
    const Result<int> slot = choose_slot(options.name);
    if (!slot.ok()) return slot.status();
    if (Status status = check_floor(options, slot.value()); !status.ok()) return status;
    if (Status status = lock_byte((*fd)->get(), alive_byte(slot.value(), 0)); !status.ok()) return status;
    (void)fault::point("ledger.join.locked");
    const std::uint64_t incarnation = write_row(options, slot.value());
    return std::unique_ptr<Tenant>(std::make_unique<TableTenant>(shared_from_this(), *table_, std::move(fd).value(),
                                                                 slot.value(), 0, incarnation));
}

Result<std::unique_ptr<Tenant>> TableLedger::attach(int slot, std::uint64_t incarnation) {
    if (slot < 0 || slot >= kMaxTenants || incarnation == 0) {
        return Status{Code::invalid, "slot " + std::to_string(slot) + ", incarnation " + std::to_string(incarnation) +
                                         " name no tenant; pass on what join() gave"};
    }
    Result<std::unique_ptr<GuardedFd>> fd = open_alive(*table_);
    if (!fd.ok()) return fd.status();
    Result<TableGuard> guard = table_->lock("attaching to a tenant");
    if (!guard.ok()) return guard.status();
    if (Status status = table_->check_current(); !status.ok()) return status;
    table_->reap();
    if (get(table_->row(slot).incarnation) != incarnation) {
        return Status{Code::not_found, "the tenant in slot " + std::to_string(slot) + ", incarnation " +
                                           std::to_string(incarnation) + ", on device '" + table_->device() +
                                           "' is gone; start its engine again"};
    }
    for (int member = 0; member < kMaxMembers; ++member) {
        const Status status = lock_byte((*fd)->get(), alive_byte(slot, member));
        if (status.code() == Code::exists) continue;
        if (!status.ok()) return status;
        (void)fault::point("ledger.attach.locked");
        put(table_->row(slot).mapped[static_cast<std::size_t>(member)], 0);
        put(table_->row(slot).static_used[static_cast<std::size_t>(member)], 0);
        return std::unique_ptr<Tenant>(std::make_unique<TableTenant>(shared_from_this(), *table_, std::move(fd).value(),
                                                                     slot, member, incarnation));
    }
    return Status{Code::exists, "tenant '" + table_->row(slot).name.load() + "' has all of its " +
                                    std::to_string(kMaxMembers) + " member processes already"};
}

Result<LedgerView> TableLedger::view() {
    Result<TableGuard> guard = table_->lock("reading the ledger");
    if (!guard.ok()) return guard.status();
    table_->reap();
    Result<std::uint64_t> capacity = table_->capacity();
    if (!capacity.ok()) return capacity.status();
    LedgerView view;
    view.device = table_->device();
    view.capacity = *capacity;
    view.unmanaged = get(table_->header().unmanaged);
    view.revision = get(table_->header().revision);
    const std::uint64_t now = now_ns();
    for (int slot = 0; slot < kMaxTenants; ++slot) {
        if (get(table_->row(slot).named) != 0) view.tenants.push_back(view_row(table_->row(slot), slot, now));
    }
    return view;
}

Status TableLedger::unknown_name(const std::string &name) {
    std::string names;
    for (int slot = 0; slot < kMaxTenants; ++slot) {
        if (get(table_->row(slot).named) != 0) names += (names.empty() ? "" : ", ") + table_->row(slot).name.load();
    }
    return {Code::not_found, "no tenant named '" + name + "' on device '" + table_->device() + "'; there " +
                                 (names.empty() ? std::string("is none") : "are: " + names)};
}

Status TableLedger::forget(const std::string &name) {
    Result<TableGuard> guard = table_->lock("forgetting a tenant");
    if (!guard.ok()) return guard.status();
    table_->reap();
    const int slot = table_->find_name(name);
    if (slot < 0) return unknown_name(name);
    if (table_->lives(slot)) {
        return {Code::exists, "tenant '" + name + "' runs (started by process " +
                                  std::to_string(get(table_->row(slot).pid)) + "); stop it before forgetting it"};
    }
    put(table_->row(slot).named, 0);
    table_->header().revision.fetch_add(1, std::memory_order_relaxed);
    return {};
}

Status TableLedger::set_unmanaged(std::uint64_t bytes) {
    if (bytes >= kMaxBytes)
        return {Code::invalid, human_bytes(bytes) + " held by others is above what a ledger counts"};
    const std::uint64_t before = table_->header().unmanaged.exchange(bytes, std::memory_order_relaxed);
    if (bytes < before) table_->ring_freed();
    if (!table_->over_capacity()) return {};
    Result<TableGuard> guard = table_->lock("making room for processes outside elastickv");
    if (!guard.ok()) return guard.status();
    table_->reap();
    Result<std::uint64_t> capacity = table_->capacity();
    if (!capacity.ok()) return capacity.status();
    const policy::Snapshot snapshot = table_->snapshot(*capacity);
    const policy::Asks asked = policy::asks(snapshot);
    for (int i = 0; i < snapshot.count; ++i) {
        const Ask &ask = asked[static_cast<std::size_t>(i)];
        const int slot = snapshot.claims[static_cast<std::size_t>(i)].slot;
        if (ask.mapped_free + ask.cached + ask.as_freed > 0) futex_ring(table_->row(slot).bell);
    }
    return {};
}

}  // namespace ledger
}  // namespace elastickv
