// The ledger: one small shared file per device in which every tenant's floor, limit, leases and demand stand.
//
// All processes on the device map the same file and change it under one robust process-shared mutex. Nothing derived
// is stored (sums are computed from the tenants' rows when needed), every field is one aligned 64-bit word written
// atomically, so a process may die between any two instructions and the table still means something. A tenant is
// alive exactly while some process holds an open-file-description lock on one of its bytes in the "alive" file:
// the kernel drops that lock when the process dies, however it dies. See docs/design.md.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status.hpp"

namespace elastickv {

inline constexpr std::uint64_t kNoLimit = ~std::uint64_t{0};
inline constexpr int kMaxTenants = 64;  // rows of the table
inline constexpr int kMaxMembers = 64;  // processes of one tenant (scheduler, ranks)

// What a pool reports of itself; bytes. Written by the tenant alone, read by everybody (relaxed atomics).
struct Usage {
    std::uint64_t virtual_bytes = 0;
    std::uint64_t used = 0;         // pages with at least one block in use
    std::uint64_t cached = 0;       // pages with cached blocks and none in use: may be given back by evicting
    std::uint64_t mapped_free = 0;  // mapped pages with nothing on them: may be given back at once
    std::uint64_t transit = 0;      // leased, being mapped or unmapped
    std::uint64_t leaving = 0;      // of these, being unmapped: they will be somebody else's
    std::uint64_t pinned = 0;       // of those used: the pages of block 0, which stay while the engine runs
    bool working = false;           // requests hold blocks; the page of block 0 is used for ever, and is no work
};

// Counted since the tenant joined. Evictions are cached blocks dropped, by what dropped them.
struct Counters {
    std::uint64_t misses = 0;             // leases refused
    std::uint64_t evicted_need = 0;       // the tenant's own allocation took the block
    std::uint64_t evicted_neighbour = 0;  // given back to a tenant that waits
    std::uint64_t evicted_limit = 0;      // an order of the operator's: a lowered limit, or a trim
    std::uint64_t evicted_idle = 0;       // the engine was idle for long
    std::uint64_t evicted_budget = 0;     // the cache was above its own byte budget
    std::uint64_t asked = 0;              // give-backs asked of this tenant
    std::uint64_t answered = 0;           // give-backs it answered
    std::uint64_t late = 0;               // asks whose deadline passed first

    std::uint64_t evicted() const noexcept {
        return evicted_need + evicted_neighbour + evicted_limit + evicted_idle + evicted_budget;
    }
};

// What a tenant's processes measure. lease_wait: how long an allocation waited for the neighbours, whether it was
// granted in the end or not. map, unmap: one extent, with all driver calls it took.
enum class Latency : std::uint8_t { lease_wait = 0, map = 1, unmap = 2 };
inline constexpr std::size_t kLatencies = 3;
// Upper bounds of the buckets in microseconds, inclusive; one more bucket has what is above.
inline constexpr std::array<std::uint64_t, 16> kLatencyBoundsUs = {
    10, 20, 50, 100, 200, 500, 1'000, 2'000, 5'000, 10'000, 20'000, 50'000, 100'000, 200'000, 500'000, 1'000'000};

struct Histogram {
    std::array<std::uint64_t, kLatencyBoundsUs.size() + 1> counts{};  // by bucket, not cumulative
    std::uint64_t sum_ns = 0;
};

struct TenantOptions {
    std::string name;                // [A-Za-z0-9._-]{1,63}
    bool lasting = true;             // false: the name was made up for this life, and is forgotten at its end
    std::uint64_t floor = 0;         // bytes of leased + static that stay promised to this tenant
    std::uint64_t limit = kNoLimit;  // bytes of leased + static at most; used only if `set_limit`
    bool set_limit = false;          // false: keep the limit the name has on the ledger from before
    std::uint32_t weight = 1;        // 1..1000
    std::int32_t priority = 0;       // higher keeps its cache longer
    std::string engine;              // free text, e.g. "vllm 0.32.0"
    std::string layout;              // free text, e.g. "layer-outermost 30 spans"
    std::uint64_t page_bytes = 0;    // informative
};

struct TenantView {
    int slot = -1;
    std::string name, engine, layout;
    bool alive = false;
    std::uint64_t incarnation = 0;  // changes with every join
    std::int64_t pid = 0;           // of the process that joined; informative only
    std::uint64_t since_unix_ns = 0;
    std::uint64_t floor = 0, leased = 0, static_bytes = 0, mapped = 0;
    std::uint64_t static_used = 0;  // of static_bytes, what its processes say they really have on the device
    std::uint64_t limit_wanted = kNoLimit, limit_wanted_rev = 0, limit_held = kNoLimit, limit_held_rev = 0;
    bool limit_now = false;         // the wanted limit is to be reached by preempting, too
    std::uint64_t trim_wanted = 0;  // bytes of a trim that is not answered yet
    std::uint32_t weight = 1;
    std::int32_t priority = 0;
    std::uint64_t demand = 0;         // bytes wanted and refused, still waiting (0 when expired)
    std::uint64_t backlog = 0;        // bytes that wait behind it, as the tenant says (0 when the demand has expired)
    std::uint64_t demand_ticket = 0;  // order of arrival
    std::uint64_t demand_age_ns = 0;
    std::uint64_t page_bytes = 0;
    Usage usage;
    Counters counters;
    std::array<Histogram, kLatencies> histograms;  // by Latency
};

struct LedgerView {
    std::string device;
    std::uint64_t capacity = 0;   // bytes
    std::uint64_t unmanaged = 0;  // bytes held by processes that are no tenants
    std::uint64_t revision = 0;
    std::vector<TenantView> tenants;  // rows in use: the living, and names whose limit is kept
};

// What a tenant should give back now, by the policy (policy.hpp); bytes, rounded up by the giver to its pages.
struct Ask {
    std::uint64_t mapped_free = 0;
    std::uint64_t cached = 0;
    std::uint64_t over_limit = 0;  // held above the limit: must shrink, running requests excepted
    std::uint64_t as_freed = 0;    // used bytes above the weighted share that others wait for: to be given back
                                   // as their pages become free, before they are used again
    std::uint64_t trim = 0;        // ordered by the operator: mapped free first, then cached; never under the floor
    bool now = false;              // over_limit is to be reached even if running requests have to be preempted
    std::uint64_t along = 0;       // mapped free bytes that may go besides: nobody waits for them yet
};

struct LedgerOptions {
    std::string directory;             // private: 0700, ours, no symlink; created if absent
    std::string device;                // "host" or a GPU UUID
    std::uint64_t capacity = 0;        // bytes; 0: adopt what the file says (not_found if there is no file)
    std::uint64_t deadline_ms = 2000;  // for the lock
};

class Tenant;

class Ledger : public std::enable_shared_from_this<Ledger> {
  public:
    // Opens or creates. denied: directory/file owner, mode or symlink. corrupt: magic, version, checksum of the
    // header, size. exists: a live tenant holds the device at another capacity. Texts name path, value and remedy.
    static Result<std::shared_ptr<Ledger>> open(const LedgerOptions &options);
    virtual ~Ledger() = default;

    // Registers a tenant and this process as its first member. exists: a live tenant has the name, or the table is
    // full. invalid: name, floor > limit, floor > capacity left after the floors of the others.
    virtual Result<std::unique_ptr<Tenant>> join(const TenantOptions &options) = 0;
    // Another process of a tenant (a rank) joins as member; keeps the tenant alive while it lives.
    virtual Result<std::unique_ptr<Tenant>> attach(int slot, std::uint64_t incarnation) = 0;

    virtual Result<LedgerView> view() = 0;  // reaps the dead first
    virtual std::string path() const = 0;

    // Orders a limit; returns its revision. Works for dead named tenants too (kept for the restart). `now`: the tenant
    // is to preempt running requests if need be, and acknowledges only once it holds no more than the limit.
    // invalid: under the floor; not_found: no such name (text lists the names there are).
    virtual Result<std::uint64_t> order_limit(const std::string &name, std::uint64_t bytes, bool now = false) = 0;
    // Waits until the tenant acknowledged `revision`; timeout / not_found (died) otherwise. `interrupted` is asked
    // every 20 ms or so, with no lock held, and ends the wait (timeout) when it answers true.
    virtual Status wait_limit(const std::string &name, std::uint64_t revision, std::uint64_t timeout_ms,
                              const std::function<bool()> &interrupted = {}) = 0;
    // Orders a tenant to give back `bytes` once, mapped free pages first, then cached ones, never used ones and never
    // under its floor; returns the order's revision. A later order takes the place of one that is still open.
    // invalid: no bytes; not_found: no such name, or it does not run.
    virtual Result<std::uint64_t> order_trim(const std::string &name, std::uint64_t bytes) = 0;
    // Waits until the tenant answered the trim (or a later one); returns the bytes it gives back. They are free once
    // its running step is through. timeout / not_found (died, and the order with it) otherwise.
    virtual Result<std::uint64_t> wait_trim(const std::string &name, std::uint64_t revision, std::uint64_t timeout_ms,
                                            const std::function<bool()> &interrupted = {}) = 0;
    // Drops the row of a name that is not alive. exists: alive.
    virtual Status forget(const std::string &name) = 0;
    virtual Status set_unmanaged(std::uint64_t bytes) = 0;
};

// A process's hold on one row. Thread-safe. Destruction leaves: the last member's departure frees the row's leases.
class Tenant {
  public:
    virtual ~Tenant() = default;
    // What destruction does, at once: for an object that others still point at. Afterwards calls are denied or do
    // nothing, as they do in a forked child, which is no member of its parent's tenants.
    virtual void leave() noexcept {}
    virtual int slot() const noexcept = 0;
    virtual std::uint64_t incarnation() const noexcept = 0;
    virtual const std::shared_ptr<Ledger> &ledger() const noexcept = 0;

    // Takes `bytes` more, all or nothing. `ring`: when refused, record the demand and ring the neighbours' bells;
    // otherwise leave no trace. unavailable / limit when refused.
    virtual Status lease(std::uint64_t bytes, bool ring) = 0;
    // What waits behind the next lease, bytes: where that is refused, the neighbours are asked for both. Stands until
    // it is set anew.
    virtual void set_backlog(std::uint64_t) noexcept {}
    // The same for what is not KV (weights, graphs): counted in static_bytes.
    virtual Status lease_static(std::uint64_t bytes, bool ring) = 0;
    virtual void give(std::uint64_t bytes) noexcept = 0;
    virtual void give_static(std::uint64_t bytes) noexcept = 0;
    virtual void withdraw_demand() noexcept = 0;  // no longer waiting
    // Waits until somebody gave bytes back (or died) since `seen`, or the timeout; returns the new word.
    virtual std::uint32_t freed_word() const noexcept = 0;
    virtual std::uint32_t wait_freed(std::uint32_t seen, std::uint64_t timeout_us) noexcept = 0;

    // The bell: rung when a neighbour is refused or a limit is ordered. Waits as wait_freed does.
    virtual std::uint32_t bell_word() const noexcept = 0;
    virtual std::uint32_t wait_bell(std::uint32_t seen, std::uint64_t timeout_us) noexcept = 0;
    // Wakes waiters of this tenant's bell in this process (to stop a thread).
    virtual void ring_self() noexcept = 0;

    virtual Ask ask() = 0;  // computed now, from the table, by the policy
    virtual bool
    pressed() noexcept = 0;  // cheap hint (no lock): is any neighbour's demand waiting, or a limit order open?
    virtual void answered() noexcept = 0;  // this tenant has done what ask() said as far as it can

    struct Limit {
        std::uint64_t bytes = kNoLimit, revision = 0;
        bool now = false;
    };
    virtual Limit limit_wanted() const noexcept = 0;
    virtual Limit limit_held() const noexcept = 0;
    virtual void acknowledge_limit(const Limit &limit) noexcept = 0;

    struct Trim {
        std::uint64_t bytes = 0, revision = 0;
    };
    virtual Trim trim_wanted() const noexcept = 0;
    virtual Trim trim_done() const noexcept = 0;
    virtual void acknowledge_trim(const Trim &given) noexcept = 0;  // `bytes` given back for the order of `revision`

    virtual std::uint64_t leased() const noexcept = 0;
    virtual std::uint64_t static_bytes() const noexcept { return 0; }
    virtual std::uint64_t floor() const noexcept = 0;
    virtual std::uint64_t headroom() = 0;  // bytes lease() would grant now
    // Bytes that a demand may at most be for; one for more is ignored.
    virtual std::uint64_t reachable() { return headroom(); }
    // Of the counters, those of asks are the ledger's own and not taken from here.
    virtual void publish(const Usage &usage, const Counters &counters) noexcept = 0;
    virtual void add_mapped(std::int64_t bytes) noexcept = 0;  // by mappers
    // What this process has on the device of the tenant's static lease now. Each member says its own; they add up.
    virtual void publish_static_used(std::uint64_t bytes) noexcept = 0;
    virtual void observe(Latency what, std::uint64_t ns) noexcept = 0;  // no lock
    // What stands in the row for people, and is known only after the join, or changes.
    struct Description {
        std::optional<std::string> engine, layout;
        std::optional<std::uint64_t> page_bytes;
    };
    virtual void describe(const Description &) noexcept {}
};

}  // namespace elastickv
