// The fault switch itself.
#include "driver/faulty.hpp"

#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "check.hpp"
#include "driver/handles.hpp"
#include "driver/host.hpp"

namespace elastickv {

namespace {

constexpr std::uint64_t kPage = 64 * 1024;

template <class T> T must(Result<T> result) {
    if (!result.ok()) check::fail(__FILE__, __LINE__, result.status().message());
    return std::move(result).value();
}
std::shared_ptr<FaultyDriver> faulty_host() {
    return std::make_shared<FaultyDriver>(must(make_host_driver({kPage, std::uint64_t{64} << 20})));
}
std::uint64_t count(const FaultyDriver &driver, Call call) {
    return driver.counts().at(static_cast<std::size_t>(call));
}
double milliseconds_of(const std::function<void()> &body) {
    const auto start = std::chrono::steady_clock::now();
    body();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

TEST("faulty driver: the nth call fails with the status that was ordered, and only that one") {
    auto driver = faulty_host();
    CHECK_OK(driver->create(kPage));
    driver->fail(Call::create, 2, Status(Code::out_of_memory, "no more"));
    CHECK_OK(driver->create(kPage));
    const Result<PhysicalId> third = driver->create(kPage);
    CHECK(third.status().code() == Code::out_of_memory);
    CHECK_EQ(third.status().message(), std::string("no more"));
    CHECK_OK(driver->create(kPage));
    CHECK_EQ(count(*driver, Call::create), 4u);
    CHECK_EQ(driver->stats().physicals, 3u);  // the failed call was not passed on
    CHECK_EQ(count(*driver, Call::map), 0u);
}

TEST("faulty driver: every kth call fails until it is told to stop") {
    auto driver = faulty_host();
    driver->fail_every(Call::reserve, 3);
    std::string pattern;
    for (int i = 0; i < 7; ++i) pattern += driver->reserve(kPage).ok() ? '+' : '-';
    CHECK_EQ(pattern, std::string("++-++-+"));
    driver->fail_every(Call::reserve, 0);
    for (int i = 0; i < 6; ++i) CHECK_OK(driver->reserve(kPage));
    driver->fail_every(Call::create, 1);
    CHECK(driver->create(kPage).status().code() == Code::out_of_memory);
    driver->heal();
    CHECK_OK(driver->create(kPage));
    CHECK_EQ(count(*driver, Call::create), 2u);
}

TEST("faulty driver: every call can fail, and says that it was injected") {
    auto driver = faulty_host();
    for (std::size_t i = 0; i < kCallKinds; ++i) driver->fail_every(static_cast<Call>(i), 1);
    const std::vector<Status> all = {driver->reserve(kPage).status(), driver->free_address(0, kPage),
                                     driver->create(kPage).status(),  driver->release(1),
                                     driver->map(0, kPage, 1),        driver->set_access(0, kPage),
                                     driver->unmap(0, kPage),         driver->memory_info().status(),
                                     driver->record(0).status()};
    CHECK_EQ(all.size(), kCallKinds);
    for (const Status &status : all) CHECK(status.message().find("injected: every 1th") == 0);
    for (const std::uint64_t calls : driver->counts()) CHECK_EQ(calls, 1u);
}

TEST("faulty driver: delays") {
    auto driver = faulty_host();
    driver->delay(Call::memory_info, 2, 30000);
    const auto ask = [&] { CHECK_OK(driver->memory_info()); };
    CHECK(milliseconds_of(ask) < 25);
    CHECK(milliseconds_of(ask) >= 30);
    CHECK(milliseconds_of(ask) < 25);
    driver->delay(Call::memory_info, 0, 10000);
    CHECK(milliseconds_of([&] {
              ask();
              ask();
          }) >= 20);
    driver->delay(Call::memory_info, 0, 0);
    CHECK(milliseconds_of(ask) < 8);
}

TEST("faulty driver: a failing undo is counted as a leak, and the driver still knows the thing") {
    auto driver = faulty_host();
    const std::uint64_t before = leaked_calls();
    {
        Reservation range = must(Reservation::make(driver, 4 * kPage));
        Physical memory = must(Physical::make(driver, kPage));
        Mapping mapping = must(Mapping::make(driver, range.address(), kPage, memory.id()));
        driver->fail(Call::unmap, 1, Status(Code::driver, "injected"));
    }
    CHECK_EQ(leaked_calls() - before, 3u);  // the unmap, and the two that cannot go while it stays
    CHECK_EQ(driver->stats().mapped_bytes, kPage);
    CHECK_EQ(driver->stats().reservations, 1u);
    Physical explicitly = must(Physical::make(driver, kPage));
    driver->fail(Call::release, 1, Status(Code::driver, "injected"));
    CHECK_EQ(explicitly.close().message(), std::string("injected"));  // said, hence not counted
    CHECK_EQ(leaked_calls() - before, 3u);
}

TEST("faulty driver: a mapping whose access fails is unmapped again") {
    auto driver = faulty_host();
    Reservation range = must(Reservation::make(driver, kPage));
    Physical memory = must(Physical::make(driver, kPage));
    driver->fail(Call::set_access, 1, Status(Code::driver, "injected"));
    CHECK(!Mapping::make(driver, range.address(), kPage, memory.id()).ok());
    CHECK_EQ(driver->stats().mappings, 0u);
    CHECK_EQ(count(*driver, Call::unmap), 1u);
}

TEST("handles: moving leaves one owner") {
    auto driver = faulty_host();
    const std::uint64_t before = leaked_calls();
    {
        Physical first = must(Physical::make(driver, kPage));
        const PhysicalId id = first.id();
        Physical second(std::move(first));
        CHECK(!first);  // NOLINT(bugprone-use-after-move): that is what is tested
        CHECK_EQ(second.id(), id);
        Physical third = must(Physical::make(driver, 2 * kPage));
        third = std::move(second);
        CHECK_EQ(driver->stats().created_bytes, kPage);  // what third had before has gone
        CHECK_EQ(third.id(), id);
        Reservation range;
        CHECK(!range);
        range = must(Reservation::make(driver, kPage));
        CHECK_OK(range.close());
        CHECK_OK(range.close());
        CHECK(!range);
    }
    CHECK(driver->stats() == DriverStats{});
    CHECK_EQ(count(*driver, Call::release), 2u);
    CHECK_EQ(leaked_calls(), before);
}

TEST("faulty driver: manual fences pass when the test says so, oldest first") {
    auto driver = faulty_host();
    CHECK(must(must(driver->record(0))->done()));
    driver->manual_fences(true);
    auto first = must(driver->record(0));
    auto second = must(driver->record(0));
    CHECK_EQ(driver->pending_fences(), 2u);
    CHECK(!must(first->done()));
    CHECK_EQ(driver->complete_fences(1), 1u);
    CHECK(must(first->done()));
    CHECK(!must(second->done()));
    driver->fail_fences(Status(Code::driver, "the device is lost"));
    CHECK_EQ(second->done().status().message(), std::string("the device is lost"));
    driver->fail_fences({});
    CHECK(!must(second->done()));
    CHECK_EQ(driver->complete_fences(), 1u);
    CHECK(must(second->done()));
    driver->manual_fences(false);
    CHECK(must(must(driver->record(0))->done()));
}

TEST("faulty driver: an unknown call name lists the known ones") {
    const Result<Call> unknown = call_from_name("unmapp");
    CHECK_EQ(unknown.status().message(),
             std::string(
                 "there is no driver call named 'unmapp'; the calls are reserve, free_address, create, release, map, "
                 "set_access, unmap, memory_info, record"));
    CHECK(must(call_from_name("unmap")) == Call::unmap);
}

TEST("faulty driver: orders and calls from many threads") {
    auto driver = faulty_host();
    driver->fail_every(Call::create, 5);
    std::atomic<int> failed{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&] {
            for (int i = 0; i < 100; ++i) {
                if (!Physical::make(driver, kPage).ok()) ++failed;
                driver->delay(Call::create, 1, 1);
            }
        });
    }
    for (std::thread &thread : threads) thread.join();
    CHECK_EQ(count(*driver, Call::create), 400u);
    CHECK_EQ(failed.load(), 80);
    CHECK(driver->stats() == DriverStats{});
}

}  // namespace

}  // namespace elastickv
