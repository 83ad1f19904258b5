// The ledger and a tenant's hold on it. Everything that may wait releases the GIL.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>

#include "base/faultpoint.hpp"
#include "convert.hpp"
#include "ledger/ledger.hpp"

namespace elastickv::py {
namespace {

constexpr std::array<std::string_view, kLatencies> kLatencyNames = {"lease_wait", "map", "unmap"};  // by Latency

using Limit = std::pair<std::optional<std::uint64_t>, std::uint64_t>;

std::optional<std::uint64_t> limit_or_none(std::uint64_t bytes) {
    return bytes == kNoLimit ? std::nullopt : std::optional<std::uint64_t>(bytes);
}
Limit limit_pair(const Tenant::Limit &limit) { return {limit_or_none(limit.bytes), limit.revision}; }

nb::dict usage_dict(const Usage &usage) {
    nb::dict out;
    out["virtual_bytes"] = usage.virtual_bytes;
    out["used"] = usage.used;
    out["cached"] = usage.cached;
    out["mapped_free"] = usage.mapped_free;
    out["transit"] = usage.transit;
    out["pinned"] = usage.pinned;
    return out;
}

nb::dict counters_dict(const Counters &counters) {
    nb::dict out;
    out["misses"] = counters.misses;
    out["evicted_need"] = counters.evicted_need;
    out["evicted_neighbour"] = counters.evicted_neighbour;
    out["evicted_limit"] = counters.evicted_limit;
    out["evicted_idle"] = counters.evicted_idle;
    out["evicted_budget"] = counters.evicted_budget;
    out["asked"] = counters.asked;
    out["answered"] = counters.answered;
    out["late"] = counters.late;
    return out;
}

nb::dict histograms_dict(const TenantView &tenant) {
    nb::dict out;
    for (std::size_t i = 0; i < kLatencies; ++i) {
        nb::list counts;
        for (const std::uint64_t count : tenant.histograms[i].counts) counts.append(count);
        nb::dict one;
        one["counts"] = counts;
        one["sum_ns"] = tenant.histograms[i].sum_ns;
        out[kLatencyNames[i].data()] = one;
    }
    return out;
}

nb::dict tenant_dict(const TenantView &tenant) {
    nb::dict out;
    out["slot"] = tenant.slot;
    out["name"] = tenant.name;
    out["engine"] = tenant.engine;
    out["layout"] = tenant.layout;
    out["alive"] = tenant.alive;
    out["incarnation"] = tenant.incarnation;
    out["pid"] = tenant.pid;
    out["since_unix_ns"] = tenant.since_unix_ns;
    out["floor"] = tenant.floor;
    out["leased"] = tenant.leased;
    out["static_bytes"] = tenant.static_bytes;
    out["static_used"] = tenant.static_used;
    out["mapped"] = tenant.mapped;
    out["limit_wanted"] = limit_or_none(tenant.limit_wanted);
    out["limit_wanted_rev"] = tenant.limit_wanted_rev;
    out["limit_now"] = tenant.limit_now;
    out["limit_held"] = limit_or_none(tenant.limit_held);
    out["limit_held_rev"] = tenant.limit_held_rev;
    out["trim_wanted"] = tenant.trim_wanted;
    out["weight"] = tenant.weight;
    out["priority"] = tenant.priority;
    out["demand"] = tenant.demand;
    out["backlog"] = tenant.backlog;
    out["demand_ticket"] = tenant.demand_ticket;
    out["demand_age_ns"] = tenant.demand_age_ns;
    out["page_bytes"] = tenant.page_bytes;
    out["usage"] = usage_dict(tenant.usage);
    out["counters"] = counters_dict(tenant.counters);
    out["histograms"] = histograms_dict(tenant);
    return out;
}

nb::dict view_dict(Ledger &ledger) {
    const LedgerView view = unwrap(without_gil([&] { return ledger.view(); }));
    nb::dict out;
    out["device"] = view.device;
    out["capacity"] = view.capacity;
    out["unmanaged"] = view.unmanaged;
    out["revision"] = view.revision;
    nb::list tenants;
    for (const TenantView &tenant : view.tenants) tenants.append(tenant_dict(tenant));
    out["tenants"] = tenants;
    return out;
}

std::shared_ptr<Ledger> open_ledger(std::string directory, std::string device, std::uint64_t capacity,
                                    std::uint64_t deadline_ms) {
    const LedgerOptions options{std::move(directory), std::move(device), capacity, deadline_ms};
    return unwrap(without_gil([&] { return Ledger::open(options); }));
}

std::shared_ptr<Tenant> join(Ledger &ledger, std::string name, std::uint64_t floor, std::optional<std::uint64_t> limit,
                             std::optional<bool> set_limit, std::uint32_t weight, std::int32_t priority,
                             std::string engine, std::string layout, std::uint64_t page_bytes, bool lasting) {
    TenantOptions options;
    options.name = std::move(name);
    options.floor = floor;
    options.limit = limit.value_or(kNoLimit);
    options.set_limit = set_limit.value_or(limit.has_value());
    options.weight = weight;
    options.priority = priority;
    options.engine = std::move(engine);
    options.layout = std::move(layout);
    options.page_bytes = page_bytes;
    options.lasting = lasting;
    return std::shared_ptr<Tenant>(unwrap(without_gil([&] { return ledger.join(options); })));
}

// Calls wait(interrupted) without the GIL and lets Python's signal handlers run meanwhile, so that Ctrl-C ends it.
template <class Wait> auto wait_interruptibly(Wait wait) {
    bool signalled = false;
    auto result = [&] {
        Unlocked unlocked;
        return wait([&] { return signalled = unlocked.locked([] { return PyErr_CheckSignals() != 0; }); });
    }();
    if (signalled) throw nb::python_error();
    return result;
}

bool granted(const Status &status) {
    if (status.ok()) return true;
    if (status.code() == Code::unavailable || status.code() == Code::limit) return false;
    raise(status);
}

nb::dict ask_dict(Tenant &tenant) {
    const Ask ask = without_gil([&] { return tenant.ask(); });
    nb::dict out;
    out["mapped_free"] = ask.mapped_free;
    out["cached"] = ask.cached;
    out["over_limit"] = ask.over_limit;
    out["as_freed"] = ask.as_freed;
    out["trim"] = ask.trim;
    out["now"] = ask.now;
    out["along"] = ask.along;
    return out;
}

void bind_tenant(nb::module_ &module) {
    const auto unlocked = nb::call_guard<Unlocked>();
    nb::class_<Tenant>(module, "Tenant", "A process's hold on one tenant of a ledger. Thread-safe. Sizes are bytes.")
        .def_prop_ro("slot", &Tenant::slot)
        .def_prop_ro("incarnation", &Tenant::incarnation)
        .def(
            "lease",
            [](Tenant &self, std::uint64_t bytes, bool ring) {
                return granted(without_gil([&] { return self.lease(bytes, ring); }));
            },
            nb::arg("bytes"), nb::arg("ring") = false,
            "Takes bytes more, all or nothing. False: none now, or the limit forbids it.")
        .def(
            "lease_static",
            [](Tenant &self, std::uint64_t bytes, bool ring) {
                return granted(without_gil([&] { return self.lease_static(bytes, ring); }));
            },
            nb::arg("bytes"), nb::arg("ring") = false, "The same for what is no cache: weights, graphs.")
        .def("give", &Tenant::give, nb::arg("bytes"), unlocked)
        .def("give_static", &Tenant::give_static, nb::arg("bytes"), unlocked)
        .def("withdraw_demand", &Tenant::withdraw_demand, unlocked)
        .def_prop_ro("leased", &Tenant::leased)
        .def_prop_ro("static_bytes", &Tenant::static_bytes)
        .def_prop_ro("floor", &Tenant::floor)
        .def("headroom", &Tenant::headroom, unlocked, "Bytes that lease() would grant now.")
        .def_prop_ro("limit_wanted", [](Tenant &self) { return limit_pair(self.limit_wanted()); })
        .def_prop_ro("limit_held", [](Tenant &self) { return limit_pair(self.limit_held()); })
        .def(
            "acknowledge_limit",
            [](Tenant &self, std::optional<std::uint64_t> bytes, std::uint64_t revision) {
                self.acknowledge_limit({bytes.value_or(kNoLimit), revision});
            },
            nb::arg("bytes").none(), nb::arg("revision"), unlocked)
        .def_prop_ro("trim_wanted",
                     [](Tenant &self) { return std::make_pair(self.trim_wanted().bytes, self.trim_wanted().revision); })
        .def(
            "acknowledge_trim",
            [](Tenant &self, std::uint64_t given, std::uint64_t revision) { self.acknowledge_trim({given, revision}); },
            nb::arg("given"), nb::arg("revision"), unlocked)
        .def("ask", &ask_dict, "What the sharing policy asks this tenant to give back now.")
        .def("answered", &Tenant::answered, unlocked)
        .def("pressed", &Tenant::pressed, "Cheap hint: does a neighbour wait, or is a limit order open?")
        .def(
            "publish",
            [](Tenant &self, std::uint64_t virtual_bytes, std::uint64_t used, std::uint64_t cached,
               std::uint64_t mapped_free, std::uint64_t transit, std::uint64_t misses, std::uint64_t evicted_need,
               std::uint64_t evicted_neighbour, std::uint64_t evicted_limit, std::uint64_t evicted_idle,
               std::uint64_t evicted_budget, std::uint64_t pinned, std::uint64_t leaving) {
                const Counters counters{.misses = misses,
                                        .evicted_need = evicted_need,
                                        .evicted_neighbour = evicted_neighbour,
                                        .evicted_limit = evicted_limit,
                                        .evicted_idle = evicted_idle,
                                        .evicted_budget = evicted_budget};
                self.publish({virtual_bytes, used, cached, mapped_free, transit, leaving, pinned, used > 0}, counters);
            },
            nb::arg("virtual_bytes") = 0, nb::arg("used") = 0, nb::arg("cached") = 0, nb::arg("mapped_free") = 0,
            nb::arg("transit") = 0, nb::arg("misses") = 0, nb::arg("evicted_need") = 0,
            nb::arg("evicted_neighbour") = 0, nb::arg("evicted_limit") = 0, nb::arg("evicted_idle") = 0,
            nb::arg("evicted_budget") = 0, nb::arg("pinned") = 0, nb::arg("leaving") = 0)
        .def("publish_static_used", &Tenant::publish_static_used, nb::arg("bytes"),
             "What this process has on the device of the tenant's static lease now; the members' figures add up.")
        .def(
            "observe",
            [](Tenant &self, const std::string &what, std::uint64_t ns) {
                const auto *found = std::find(kLatencyNames.begin(), kLatencyNames.end(), what);
                if (found == kLatencyNames.end())
                    raise({Code::invalid, "'" + what + "' is not measured: lease_wait, map or unmap"});
                self.observe(static_cast<Latency>(found - kLatencyNames.begin()), ns);
            },
            nb::arg("what"), nb::arg("ns"), "Adds a sample to one of the tenant's histograms.")
        .def("add_mapped", &Tenant::add_mapped, nb::arg("bytes"))
        .def(
            "describe",
            [](Tenant &self, std::optional<std::string> engine, std::optional<std::string> layout,
               std::optional<std::uint64_t> page_bytes) {
                self.describe({std::move(engine), std::move(layout), page_bytes});
            },
            nb::arg("engine").none() = nb::none(), nb::arg("layout").none() = nb::none(),
            nb::arg("page_bytes").none() = nb::none(), unlocked,
            "Changes what stands in the row for people; None leaves it.")
        .def("bell_word", &Tenant::bell_word)
        .def("wait_bell", &Tenant::wait_bell, nb::arg("seen"), nb::arg("timeout_us"), unlocked)
        .def("ring_self", &Tenant::ring_self, unlocked)
        .def("freed_word", &Tenant::freed_word)
        .def("wait_freed", &Tenant::wait_freed, nb::arg("seen"), nb::arg("timeout_us"), unlocked)
        .def("close", &Tenant::leave, unlocked, "Leaves. The last member's departure returns the leases.");
}

void bind_faults(nb::module_ &module) {
    module.def(
        "set_fault",
        [](const std::string &name, const std::string &action, std::uint64_t after, std::uint64_t delay_us) {
            const auto known = action == "kill"    ? fault::Action::kill
                               : action == "stop"  ? fault::Action::stop
                               : action == "delay" ? fault::Action::delay
                                                   : fault::Action::fail;
            if (known == fault::Action::fail && action != "fail")
                raise({Code::invalid, "'" + action + "' is no fault: kill, stop, delay or fail"});
            const fault::Setting done = fault::set(name, known, after, delay_us);
            if (done == fault::Setting::unknown)
                raise({Code::invalid, "there is no fault point '" + name + "'; docs/faults.md lists them"});
            if (done == fault::Setting::cannot_fail)
                raise({Code::invalid, "the step at fault point '" + name + "' cannot fail; kill, stop or delay there"});
        },
        nb::arg("name"), nb::arg("action"), nb::arg("after") = 0, nb::arg("delay_us") = 0,
        "For tests: what happens in this process at a named point of the core, after it was passed `after` times.");
    module.def("clear_faults", &fault::clear);
    module.def(
        "fault_passes", [](const std::string &name) { return fault::passes(name); }, nb::arg("name"),
        "How often the point was passed since it was set.");
    module.def(
        "fault_points",
        [] {
            nb::list all;
            for (const fault::PointInfo &one : fault::kPoints)
                all.append(nb::make_tuple(std::string(one.name), one.can_fail, std::string(one.what)));
            return all;
        },
        nb::sig("def fault_points() -> list[tuple[str, bool, str]]"),
        "Every fault point: its name, whether it can fail, and what it stands before or after.");
}

}  // namespace

void bind_ledger(nb::module_ &module) {
    nb::list bounds;
    for (const std::uint64_t bound : kLatencyBoundsUs) bounds.append(bound);
    module.attr("LATENCY_BOUNDS_US") = nb::tuple(bounds);
    nb::class_<Ledger>(module, "Ledger", "One device's table of tenants. Thread-safe. Sizes are bytes.")
        .def_static("open", &open_ledger, nb::arg("directory"), nb::arg("device"), nb::arg("capacity") = 0,
                    nb::arg("deadline_ms") = 2000, "Opens or creates; capacity 0 takes what is there.")
        .def("join", &join, nb::arg("name"), nb::arg("floor") = 0, nb::arg("limit").none() = nb::none(),
             nb::arg("set_limit").none() = nb::none(), nb::arg("weight") = 1, nb::arg("priority") = 0,
             nb::arg("engine") = "", nb::arg("layout") = "", nb::arg("page_bytes") = 0, nb::arg("lasting") = true,
             "Registers a tenant. The kept limit stays unless a limit is given, or set_limit is true (None: no limit). "
             "Not lasting: the name was made up, and goes with the tenant.")
        .def(
            "attach",
            [](Ledger &self, int slot, std::uint64_t incarnation) {
                return std::shared_ptr<Tenant>(unwrap(without_gil([&] { return self.attach(slot, incarnation); })));
            },
            nb::arg("slot"), nb::arg("incarnation"), "Joins a living tenant as another process of it.")
        .def("view", &view_dict, "Everything on the ledger, the dead removed first.")
        .def(
            "order_limit",
            [](Ledger &self, const std::string &name, std::optional<std::uint64_t> bytes, bool now) {
                return unwrap(without_gil([&] { return self.order_limit(name, bytes.value_or(kNoLimit), now); }));
            },
            nb::arg("name"), nb::arg("bytes").none(), nb::arg("now") = false,
            "Orders a limit (None: none); returns its revision. `now`: by preempting, too.")
        .def(
            "wait_limit",
            [](Ledger &self, const std::string &name, std::uint64_t revision, std::uint64_t timeout_ms) {
                check(wait_interruptibly([&](const std::function<bool()> &interrupted) {
                    return self.wait_limit(name, revision, timeout_ms, interrupted);
                }));
            },
            nb::arg("name"), nb::arg("revision"), nb::arg("timeout_ms"))
        .def(
            "order_trim",
            [](Ledger &self, const std::string &name, std::uint64_t bytes) {
                return unwrap(without_gil([&] { return self.order_trim(name, bytes); }));
            },
            nb::arg("name"), nb::arg("bytes"), "Orders a tenant to give bytes back once; returns the order's revision.")
        .def(
            "wait_trim",
            [](Ledger &self, const std::string &name, std::uint64_t revision, std::uint64_t timeout_ms) {
                return unwrap(wait_interruptibly([&](const std::function<bool()> &interrupted) {
                    return self.wait_trim(name, revision, timeout_ms, interrupted);
                }));
            },
            nb::arg("name"), nb::arg("revision"), nb::arg("timeout_ms"), "Waits for it; returns the bytes given back.")
        .def(
            "forget",
            [](Ledger &self, const std::string &name) { check(without_gil([&] { return self.forget(name); })); },
            nb::arg("name"))
        .def(
            "set_unmanaged",
            [](Ledger &self, std::uint64_t bytes) { check(without_gil([&] { return self.set_unmanaged(bytes); })); },
            nb::arg("bytes"))
        .def_prop_ro("path", &Ledger::path);
    bind_tenant(module);
    bind_faults(module);
}

}  // namespace elastickv::py
