// A rank's memory, and its tensor through DLPack.
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/unique_ptr.h>

#include "convert.hpp"
#include "driver/driver.hpp"
#include "ledger/ledger.hpp"
#include "memory/rank.hpp"

namespace elastickv::py {
namespace {

std::unique_ptr<Rank> attach(std::shared_ptr<Driver> driver, std::shared_ptr<PageTable> table,
                             std::shared_ptr<Tenant> tenant, std::uint32_t rank, std::uint64_t spans,
                             std::uint64_t span_bytes, std::uint64_t page_bytes) {
    RankHooks hooks{
        [tenant](std::int64_t bytes) { tenant->add_mapped(bytes); },
        [tenant](std::uint64_t bytes) { tenant->give(bytes); },
        [tenant](bool mapped, std::uint64_t ns) { tenant->observe(mapped ? Latency::map : Latency::unmap, ns); }};
    const RankOptions options{rank, spans, span_bytes, page_bytes};
    return unwrap(
        without_gil([&] { return Rank::attach(std::move(driver), std::move(table), options, std::move(hooks)); }));
}

using Tensor = nb::ndarray<nb::array_api, std::int8_t, nb::ndim<1>>;

Tensor tensor(nb::pointer_and_handle<Rank> self) {
    const auto &driver = self.p->driver();
    const std::size_t shape[1] = {static_cast<std::size_t>(self.p->bytes())};
    // The reservation outlives close(): a tensor kept too long faults, it never reads what came after it.
    return Tensor(reinterpret_cast<void *>(self.p->address()), 1, shape, self.h, nullptr, nb::dtype<std::int8_t>(),
                  driver->on_cpu() ? nb::device::cpu::value : nb::device::cuda::value, driver->ordinal());
}

}  // namespace

void bind_rank(nb::module_ &module) {
    nb::class_<Rank>(module, "Rank", "One reserved range and the thread that maps it as the page table wants.")
        .def_static("attach", &attach, nb::arg("driver"), nb::arg("table"), nb::arg("tenant"), nb::arg("rank"),
                    nb::arg("spans"), nb::arg("span_bytes"), nb::arg("page_bytes"))
        .def_prop_ro("address", &Rank::address)
        .def_prop_ro("bytes", &Rank::bytes)
        .def_prop_ro("mapped_bytes", &Rank::mapped_bytes)
        .def("array", &tensor, "The whole virtual range as a one-dimensional int8 array (DLPack), not copied.")
        .def(
            "fence", [](Rank &self, std::uint64_t ticket, std::uint64_t stream) { check(self.fence(ticket, stream)); },
            nb::arg("ticket"), nb::arg("stream") = 0)
        .def(
            "wait_first_page",
            [](Rank &self, std::uint64_t timeout_ms) {
                check(without_gil([&] { return self.wait_first_page(timeout_ms); }));
            },
            nb::arg("timeout_ms"))
        .def("offer_reclaim", &Rank::offer_reclaim, nb::arg("offered"))
        .def("wait_reclaim", &Rank::wait_reclaim, nb::arg("seen"), nb::arg("timeout_us"), nb::call_guard<Unlocked>(),
             "The newest request's number, once it is not `seen` or too late.")
        .def("reclaimed", &Rank::reclaimed, nb::arg("request"))
        .def("close", &Rank::close, nb::call_guard<Unlocked>());
}

}  // namespace elastickv::py
