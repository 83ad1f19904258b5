// The pool and its page table, for the process that schedules.
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>

#include "block_objects.hpp"
#include "convert.hpp"
#include "pool/pool.hpp"

namespace elastickv::py {
namespace {

using Ids = std::vector<std::uint32_t>;
using Share = std::pair<std::shared_ptr<Tenant>, std::uint64_t>;

std::shared_ptr<Pool> make_pool(std::shared_ptr<PageTable> table, const std::vector<Share> &shares,
                                std::uint32_t num_blocks, std::uint64_t block_bytes, std::uint64_t page_bytes,
                                std::uint32_t max_extent_pages, std::uint64_t stock_pages,
                                std::uint64_t idle_release_us, std::uint64_t cache_release_us,
                                std::uint64_t give_back_wait_us, std::uint64_t map_deadline_us,
                                std::uint64_t cache_limit_pages) {
    std::vector<Leases::Share> leases;
    for (const auto &[tenant, cost] : shares) leases.push_back({tenant, cost});
    PoolOptions options{num_blocks,      block_bytes,      page_bytes,        max_extent_pages, stock_pages,
                        idle_release_us, cache_release_us, give_back_wait_us, map_deadline_us,  cache_limit_pages};
    return unwrap(without_gil([&] { return Pool::make(std::move(table), std::move(leases), options); }));
}

std::uint32_t ensure(Pool &pool, std::uint32_t n, bool patient, bool growing) {
    if (pool.ensure_fast(n)) return pool.available();
    return without_gil([&] { return pool.ensure(n, patient, growing); });
}

nb::tuple take(Pool &pool, std::uint32_t n) {
    Ids ids(n);
    const std::uint32_t evicted = unwrap(pool.take(ids));
    return nb::make_tuple(ids, evicted);
}

nb::object alloc(Pool &pool, std::uint32_t n) {
    Ids ids(n);
    std::uint32_t evicted = 0;
    if (!without_gil([&] { return pool.alloc(ids, &evicted); })) return nb::none();
    return nb::make_tuple(ids, evicted);
}

nb::dict stats(Pool &pool) {
    const PoolStats s = pool.stats();
    const Leases::Share &share = pool.leases().shares().front();
    nb::dict out;
    out["num_blocks"] = s.num_blocks;
    out["free_blocks"] = s.free;
    out["used_blocks"] = s.used;
    out["cached_blocks"] = s.cached;
    out["withheld_blocks"] = s.withheld;
    out["coming_blocks"] = s.coming;
    out["page_cost"] = share.page_cost;
    out["virtual"] = s.pages.virtual_pages * share.page_cost;
    out["used"] = s.pages.used * share.page_cost;
    out["cached"] = s.pages.cached * share.page_cost;
    out["mapped_free"] = s.pages.free * share.page_cost;
    out["transit"] = s.pages.transit * share.page_cost;
    out["leased"] = share.tenant->leased();
    out["extents"] = s.extents;
    out["grown_extents"] = s.grown_extents;
    out["returned_extents"] = s.returned_extents;
    out["recalled_extents"] = s.recalled_extents;
    out["lost_pages"] = s.lost_pages;
    out["map_failures"] = s.map_failures;
    out["ticket"] = s.tickets;
    out["misses"] = s.counters.misses;
    out["evicted"] = s.counters.evicted();
    return out;
}

using Runs = std::vector<std::pair<std::uint32_t, std::uint32_t>>;

// Ascending ids as (first, number) of what follows one another.
Runs runs_of(const Ids &ids) {
    Runs runs;
    for (const std::uint32_t id : ids) {
        if (!runs.empty() && runs.back().first + runs.back().second == id)
            ++runs.back().second;
        else
            runs.emplace_back(id, 1);
    }
    return runs;
}

Runs take_runs(Pool &pool, std::uint32_t n) {
    Ids ids(n);
    if (unwrap(pool.take(ids)) != 0)
        raise({Code::invalid, "take_runs() is for an engine that keeps its cache itself; use take()"});
    return runs_of(ids);
}

using Ids64 = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::tuple reclaim(Pool &pool, const Ids64 &free, bool idle, bool last) {
    Ids ids(free.size());
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::uint32_t>(free.data()[i]);
    const Pool::Reclaimed out = unwrap(without_gil([&] { return pool.reclaim(ids, idle, last); }));
    return nb::make_tuple(runs_of(out.kept), out.evict, static_cast<int>(out.why));
}

bool wait_bell(Pool &pool, std::uint32_t seen, std::uint64_t timeout_us) {
    Tenant &tenant = *pool.leases().shares().front().tenant;
    return without_gil([&] { return tenant.wait_bell(seen, timeout_us); }) != seen;
}

Tenant &first_tenant(Pool &pool) { return *pool.leases().shares().front().tenant; }

void bind_page_table(nb::module_ &module) {
    nb::class_<PageTable>(module, "PageTable", "What is wanted of each page and what is so; shared with the ranks.")
        .def_static(
            "create",
            [](std::uint64_t pages, std::uint32_t ranks, std::uint64_t incarnation) {
                return unwrap(PageTable::create(pages, ranks, incarnation));
            },
            nb::arg("pages"), nb::arg("ranks"), nb::arg("incarnation"))
        .def_static(
            "open",
            [](const std::string &path, std::uint64_t incarnation) {
                return unwrap(PageTable::open(path, incarnation));
            },
            nb::arg("path"), nb::arg("incarnation"))
        .def_prop_ro("path", &PageTable::path)
        .def_prop_ro("pages", &PageTable::pages)
        .def_prop_ro("ranks", &PageTable::ranks)
        .def(
            "rank_stats",
            [](PageTable &table, std::uint32_t rank) {
                if (rank >= table.ranks()) raise({Code::invalid, "there is no rank " + std::to_string(rank)});
                RankSlot &slot = table.rank(rank);
                nb::dict out;
                out["attached"] = slot.state.load() == static_cast<std::uint32_t>(RankState::attached);
                out["mapped_bytes"] = slot.mapped_bytes.load();
                out["fence_passed"] = slot.fence_passed.load();
                out["maps"] = slot.maps.load();
                out["unmaps"] = slot.unmaps.load();
                out["map_ns"] = slot.map_ns.load();
                out["unmap_ns"] = slot.unmap_ns.load();
                out["failures"] = slot.failures.load();
                out["error"] = std::string(slot.error);
                return out;
            },
            nb::arg("rank"));
}

void bind_block_operations(nb::class_<Pool> &pool) {
    pool.def(
            "ensure", &ensure, nb::arg("n"), nb::arg("patient") = true, nb::arg("growing") = false,
            "Tries to have n blocks available; grows before it counts the cache. Returns the blocks available now. "
            "Not patient: asks the neighbours too, and does not wait for them. Growing: for requests that run already; "
            "blocks that are withheld for neighbours are handed out before one would have to be stopped.")
        .def("set_backlog", &Pool::set_backlog, nb::arg("blocks"),
             "How many blocks the engine would take after the next ensure(): requests that wait. Where ensure() is "
             "refused, the neighbours are asked for both. Stands until it is set anew.")
        .def("take", &take, nb::arg("n"), nb::sig("def take(self, n: int) -> tuple[list[int], int]"),
             "(ids, evicted): the last `evicted` ids were cached, oldest first.")
        .def("alloc", &alloc, nb::arg("n"), nb::sig("def alloc(self, n: int) -> tuple[list[int], int] | None"),
             "ensure and take in one: (ids, evicted), or None for none now.")
        .def(
            "release", [](Pool &self, const Ids &ids, bool cached) { check(self.release(ids, cached)); },
            nb::arg("ids"), nb::arg("cached") = false)
        .def(
            "touch", [](Pool &self, std::uint32_t id) { check(self.touch(id)); }, nb::arg("id"))
        .def(
            "uncache", [](Pool &self, const Ids &ids) { check(self.uncache(ids)); }, nb::arg("ids"))
        .def("take_runs", &take_runs, nb::arg("n"), nb::sig("def take_runs(self, n: int) -> list[tuple[int, int]]"),
             "Takes n free blocks, the lowest first: (first, number) of each run.")
        .def("num_available", &Pool::available)
        .def("num_used", &Pool::used);
}

}  // namespace

void bind_pool(nb::module_ &module) {
    module.attr("NEVER") = kNever;
    bind_page_table(module);
    nb::class_<Pool> pool(module, "Pool", "Which blocks are free, used or cached, and which pages they need.");
    pool.def_static("make", &make_pool, nb::arg("table"), nb::arg("shares"), nb::arg("num_blocks"),
                    nb::arg("block_bytes"), nb::arg("page_bytes"), nb::arg("max_extent_pages"),
                    nb::arg("stock_pages") = kNever, nb::arg("idle_release_us") = 2'000'000,
                    nb::arg("cache_release_us") = kNever, nb::arg("give_back_wait_us") = 20'000,
                    nb::arg("map_deadline_us") = 5'000'000, nb::arg("cache_limit_pages") = kNever)
        .def(
            "wait_ready",
            [](Pool &self, std::uint64_t timeout_ms) {
                check(without_gil([&] { return self.wait_ready(timeout_ms); }));
            },
            nb::arg("timeout_ms"))
        .def("maintain", &Pool::maintain, nb::arg("idle"), nb::call_guard<Unlocked>(),
             "Does what neighbours, limits and the idle clock ask; returns blocks whose contents must be forgotten.")
        .def("attention", &Pool::attention)
        .def("give_all", &Pool::give_all, nb::call_guard<Unlocked>(),
             "Gives back every page without a block in use, the floor's too; returns blocks that must be forgotten.")
        .def("preempt_blocks", &Pool::preempt_blocks, nb::call_guard<Unlocked>(),
             "Used blocks that must at least be given up by preempting, for a limit that was ordered to hold now. "
             "Ask again after each preemption and maintain().")
        .def("lend", &Pool::lend, nb::arg("free"), nb::arg("cached"), nb::call_guard<Unlocked>(),
             "For an engine that keeps free blocks and prefixes itself: what its used blocks really are.")
        .def(
            "reclaim", &reclaim, nb::arg("free"), nb::arg("idle"), nb::arg("last"),
            nb::sig(
                "def reclaim(self, free: object, idle: bool, last: bool) -> tuple[list[tuple[int, int]], int, int]"),
            "maintain() for such an engine. free: int64 array of the ids on its list. Returns those that stay on it as "
            "(first, number), how many blocks' worth of prefixes it should drop before it calls again, and why.")
        .def(
            "count_evicted",
            [](Pool &self, int why, std::uint64_t blocks) {
                if (why < 0 || why > static_cast<int>(Evicted::budget)) raise({Code::invalid, "no such reason"});
                self.count_evicted(static_cast<Evicted>(why), blocks);
            },
            nb::arg("why"), nb::arg("blocks"))
        .def(
            "headroom", [](Pool &self) { return self.headroom_blocks(); }, nb::call_guard<Unlocked>(),
            "Blocks that ensure() could map now beyond those that are available, without asking anybody.")
        .def("ticket", &Pool::ticket)
        .def("mark_active", &Pool::mark_active)
        .def("poll", &Pool::poll, nb::call_guard<Unlocked>())
        .def("next_deadline_us", &Pool::next_deadline_us, nb::arg("idle"), nb::call_guard<Unlocked>())
        .def("bell_word", [](Pool &self) { return first_tenant(self).bell_word(); })
        .def("wait_bell", &wait_bell, nb::arg("seen"), nb::arg("timeout_us"),
             "Blocks without the GIL until the tenant's bell is rung (True) or the timeout.")
        .def("stop_bell", [](Pool &self) { first_tenant(self).ring_self(); })
        .def("freed_word", [](Pool &self) { return self.leases().freed_word(); })
        .def(
            "wait_freed",
            [](Pool &self, std::uint32_t seen, std::uint64_t timeout_us) {
                self.leases().wait_freed(seen, timeout_us);
            },
            nb::arg("seen"), nb::arg("timeout_us"), nb::call_guard<Unlocked>())
        .def("check_integrity", [](Pool &self) { check(without_gil([&] { return self.check_integrity(); })); })
        .def("close", &Pool::close)
        .def("stats", &stats);
    bind_block_operations(pool);
    bind_block_objects(module);
}

}  // namespace elastickv::py
