// The whole stack on the stand-in, with a CUDA driver that fails once, at every call in turn, or is slow at all of
// them.
#include <cstring>

#include "stack_fixture.hpp"

namespace {

using namespace stacktest;

constexpr int kUnknown = 999;
constexpr int kNoMemory = 2;

constexpr const char *kFunctions[] = {"cuDeviceGetCount",
                                      "cuDeviceGet",
                                      "cuDeviceGetUuid_v2",
                                      "cuDeviceGetAttribute",
                                      "cuMemGetAllocationGranularity",
                                      "cuDevicePrimaryCtxGetState",
                                      "cuDevicePrimaryCtxRetain",
                                      "cuDevicePrimaryCtxRelease_v2",
                                      "cuCtxSetCurrent",
                                      "cuCtxGetCurrent",
                                      "cuMemAddressReserve",
                                      "cuMemAddressFree",
                                      "cuMemCreate",
                                      "cuMemRelease",
                                      "cuMemMap",
                                      "cuMemSetAccess",
                                      "cuMemUnmap",
                                      "cuMemsetD8Async",
                                      "cuStreamCreate",
                                      "cuStreamDestroy_v2",
                                      "cuEventCreate",
                                      "cuEventRecord",
                                      "cuEventQuery",
                                      "cuEventDestroy_v2"};

// Grows, works, gives back behind fences, grows again; then everybody's books are compared. A failure on the way may
// turn an allocation into "none now", and nothing else.
void script(Stack &stack, const std::shared_ptr<Ledger> &ledger) {
    std::vector<std::uint32_t> live;
    const auto grow = [&](std::uint32_t n) {
        const auto ids = stack.alloc(n);
        live.insert(live.end(), ids.begin(), ids.end());
    };
    const auto shrink = [&](std::size_t n, bool cached) {
        n = std::min(n, live.size());
        const std::vector<std::uint32_t> gone(live.end() - static_cast<std::ptrdiff_t>(n), live.end());
        live.resize(live.size() - n);
        CHECK_OK(stack.pool->release(gone, cached));
    };
    grow(2);
    grow(5);
    stack.step(live);
    shrink(4, false);
    stack.pool->maintain(true);
    stack.step(live);
    grow(2);
    stack.settle();
    stack.step(live);
    shrink(2, true);
    grow(2);
    stack.pool->maintain(true);
    stack.step(live);
    stack.settle();
    if (standin_pending() == 0) {
        grow(6);  // whatever was refused before, it can be had now
        CHECK(live.size() >= 6);
        stack.step(live);
    }
    stack.check_books(ledger);
    CHECK_EQ(stack.pool->stats().lost_pages, 0U);
}

// Returns whether the failure was met; everything must be as if nothing had been, once the stack has gone.
bool survives(const std::shared_ptr<Ledger> &ledger, const char *function, int nth, int code) {
    Engine engine(2);
    if (std::strcmp(function, "any") == 0) {
        standin_fail_any(nth, code);
    } else {
        standin_fail(function, nth, code);
    }
    {
        auto stack = Stack::make(ledger, engine, {});
        if (stack.ok()) {
            script(**stack, ledger);
        } else {
            CHECK(!stack.status().message().empty());
        }
    }
    const bool met = standin_pending() == 0;
    standin_heal();
    engine.check_alone();
    CHECK_EQ(standin_violations(), 0U);
    CHECK(ledgertest::rows_of(ledger).size() == 1 && !ledgertest::row_of(ledger, "stack").alive);
    if (nth % 10 == 1) {
        auto again = Stack::make(ledger, engine, {});  // nobody is in the way of the next one
        CHECK_OK(again);
        CHECK_EQ((*again)->alloc(20).size(), 20U);
    }
    engine.check_alone();
    return met;
}

void at_every_call(const char *function, int code, int stride) {
    ledgertest::Directory directory;
    auto ledger = ledgertest::open(directory, kDevice);
    int nth = 1;
    try {
        while (survives(ledger, function, nth, code)) nth += stride;
    } catch (const check::Failure &failure) {
        check::fail(__FILE__, __LINE__, std::string(function) + ", call " + std::to_string(nth) + ": " + failure.text);
    }
    CHECK(nth > 1);  // it was called at all
}

}  // namespace

TEST("stack: a driver that fails once, at each call of each kind in turn, loses nothing") {
    for (const char *function : kFunctions) at_every_call(function, kUnknown, kSlow);
}

TEST("stack: a device that has no memory once, at each call that takes some, is \"none now\"") {
    for (const char *function : {"cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuEventCreate", "cuStreamCreate"})
        at_every_call(function, kNoMemory, kSlow);
}

TEST("stack: a driver that fails once, at each call of all in turn, loses nothing") {
    at_every_call("any", kUnknown, 4 * kSlow);
}
