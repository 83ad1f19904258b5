#include "driver_contract.hpp"

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "check.hpp"
#include "driver/faulty.hpp"
#include "driver/handles.hpp"

namespace elastickv::contract {

namespace {

using Body = void (*)(const Subject &, const std::shared_ptr<Driver> &);

unsigned char *bytes_at(Address address) {
    return reinterpret_cast<unsigned char *>(static_cast<std::uintptr_t>(address));
}

void put(const Subject &subject, Address address, unsigned char value, std::uint64_t bytes) {
    const std::vector<unsigned char> data(bytes, value);
    if (subject.write) {
        subject.write(address, data.data(), bytes);
    } else {
        std::memcpy(bytes_at(address), data.data(), bytes);
    }
}

// Whether every byte of the range has this value.
bool all(const Subject &subject, Address address, unsigned char value, std::uint64_t bytes) {
    std::vector<unsigned char> data(bytes, static_cast<unsigned char>(~value));
    if (subject.read) {
        subject.read(address, data.data(), bytes);
    } else {
        std::memcpy(data.data(), bytes_at(address), bytes);
    }
    for (const unsigned char byte : data) {
        if (byte != value) return false;
    }
    return true;
}

template <class T> T must(Result<T> result) {
    if (!result.ok()) check::fail(__FILE__, __LINE__, result.status().message());
    return std::move(result).value();
}

std::string code_of(const Status &status) { return code_name(status.code()); }

// A range of `pages` pages, reserved, with memory behind it.
struct Place {
    Reservation reservation;
    Physical physical;
    Mapping mapping;
    Address address() const { return reservation.address(); }
};
Place place(const std::shared_ptr<Driver> &driver, std::uint64_t pages) {
    const std::uint64_t bytes = pages * driver->granularity();
    Place made;
    made.reservation = must(Reservation::make(driver, bytes));
    made.physical = must(Physical::make(driver, bytes));
    made.mapping = must(Mapping::make(driver, made.reservation.address(), bytes, made.physical.id()));
    return made;
}

void describes_itself(const Subject &, const std::shared_ptr<Driver> &driver) {
    CHECK(!driver->name().empty());
    CHECK(!driver->device_id().empty());
    CHECK(driver->granularity() >= 4096);
    CHECK_EQ(driver->granularity() % 4096, 0u);
    const MemoryInfo info = must(driver->memory_info());
    CHECK(info.total_bytes > 0);
    CHECK(info.free_bytes <= info.total_bytes);
    CHECK(driver->stats() == DriverStats{});
}

void reserves_addresses(const Subject &subject, const std::shared_ptr<Driver> &driver) {
    const std::uint64_t page = driver->granularity();
    const std::uint64_t held = subject.held ? subject.held(*driver) : 0;
    const std::uint64_t large = (std::uint64_t{1} << 40) / page * page;
    std::vector<Address> starts;
    for (const std::uint64_t bytes : {page, 3 * page, 512 * page, large}) {
        const Address address = must(driver->reserve(bytes));
        CHECK_EQ(address % page, 0u);
        starts.push_back(address);
    }
    CHECK_EQ(driver->stats().reservations, 4u);
    CHECK_EQ(driver->stats().reserved_bytes, 516 * page + large);
    if (subject.held) CHECK_EQ(subject.held(*driver), held);
    CHECK_OK(driver->free_address(starts[1], 3 * page));
    CHECK_OK(driver->free_address(starts[3], large));
    CHECK_OK(driver->free_address(starts[0], page));
    CHECK_OK(driver->free_address(starts[2], 512 * page));
    CHECK(driver->stats() == DriverStats{});
}

void maps_and_keeps_contents(const Subject &subject, const std::shared_ptr<Driver> &driver) {
    const std::uint64_t page = driver->granularity();
    for (const std::uint64_t pages : {1, 3, 8}) {
        const std::uint64_t bytes = pages * page;
        Reservation range = must(Reservation::make(driver, 4 * bytes));
        Physical memory = must(Physical::make(driver, bytes));
        const Address first = range.address() + page;
        const Address second = range.address() + 2 * bytes;
        Mapping mapping = must(Mapping::make(driver, first, bytes, memory.id()));
        CHECK(all(subject, first, 0, bytes));
        put(subject, first, 0x5a, bytes);
        CHECK(all(subject, first, 0x5a, bytes));
        CHECK_EQ(driver->stats().mapped_bytes, bytes);
        CHECK_OK(mapping.close());
        CHECK_EQ(driver->stats().mapped_bytes, 0u);
        mapping =
            must(Mapping::make(driver, second, bytes, memory.id()));  // the memory, not the address, holds the bytes
        CHECK(all(subject, second, 0x5a, bytes));
        Mapping again = must(Mapping::make(driver, first, bytes, memory.id()));  // and at two addresses at once
        put(subject, first, 0x33, page);
        CHECK(all(subject, second, 0x33, page));
    }
    CHECK(driver->stats() == DriverStats{});
}

void fresh_memory_is_zero(const Subject &subject, const std::shared_ptr<Driver> &driver) {
    for (int round = 0; round < 4; ++round) {
        Place made = place(driver, 4);
        CHECK(all(subject, made.address(), 0, made.physical.bytes()));
        put(subject, made.address(), 0xff, made.physical.bytes());
    }
}

void access_covers_whole_mappings(const Subject &subject, const std::shared_ptr<Driver> &driver) {
    const std::uint64_t page = driver->granularity();
    Reservation range = must(Reservation::make(driver, 4 * page));
    const Address start = range.address();
    Physical one = must(Physical::make(driver, page));
    Physical two = must(Physical::make(driver, 2 * page));
    CHECK_OK(driver->map(start, page, one.id()));
    CHECK_OK(driver->map(start + page, 2 * page, two.id()));
    CHECK_EQ(code_of(driver->set_access(start, 4 * page)), "invalid");
    CHECK_EQ(code_of(driver->set_access(start, 2 * page)), "invalid");
    CHECK_OK(driver->set_access(start, 3 * page));
    CHECK(all(subject, start, 0, 3 * page));
    put(subject, start, 9, 3 * page);
    CHECK_OK(driver->set_access(start, 3 * page));  // again: harmless, and no second clearing
    CHECK(all(subject, start, 9, 3 * page));
    CHECK_EQ(code_of(driver->unmap(start, 3 * page)), "invalid");  // two map() calls made it
    CHECK_OK(driver->unmap(start, page));
    CHECK_OK(driver->unmap(start + page, 2 * page));
}

// Runs `access` in a child with a driver of its own; returns the signal that ended it, 0 for none.
int signal_of(const std::function<void()> &access) {
    std::fflush(nullptr);
    const pid_t child = ::fork();
    if (child == 0) {
        std::signal(SIGSEGV, SIG_DFL);
        access();
        ::_exit(0);
    }
    int status = 0;
    CHECK_EQ(::waitpid(child, &status, 0), child);
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

void unmapped_addresses_fault(const Subject &subject, const std::shared_ptr<Driver> &driver) {
    if (subject.read) return;  // not the CPU's addresses: nothing here can touch them
    const std::uint64_t page = driver->granularity();
    Reservation range = must(Reservation::make(driver, 3 * page));
    const Address address = range.address() + page;
    CHECK(unreadable(address));
    Physical memory = must(Physical::make(driver, page));
    CHECK_OK(driver->map(address, page, memory.id()));
    CHECK(unreadable(address));  // no access yet
    CHECK_OK(driver->set_access(address, page));
    CHECK(!unreadable(address));
    CHECK(!unreadable(address + page - 1));
    CHECK(unreadable(address - 1));
    CHECK(unreadable(address + page));
    CHECK_OK(driver->unmap(address, page));
    CHECK(unreadable(address));

    for (const bool mapped : {true, false}) {
        const int signal = signal_of([&] {
            auto own = subject.make();
            Place made = place(own, 1);
            if (!mapped && !made.mapping.close().ok()) ::_exit(3);
            *static_cast<volatile unsigned char *>(bytes_at(made.address())) = 1;
        });
        CHECK_EQ(signal, mapped ? 0 : SIGSEGV);
    }
}

struct Wrong {
    const char *what;
    Status status;
};

void refuses_wrong_arguments(const Subject &subject, const std::shared_ptr<Driver> &driver) {
    const std::uint64_t page = driver->granularity();
    Reservation range = must(Reservation::make(driver, 8 * page));
    const Address start = range.address();
    Physical used = must(Physical::make(driver, 2 * page));
    Mapping mapping = must(Mapping::make(driver, start + 2 * page, 2 * page, used.id()));
    Physical spare = must(Physical::make(driver, 2 * page));
    put(subject, start + 2 * page, 0x77, 2 * page);
    const DriverStats before = driver->stats();
    const std::uint64_t most = std::numeric_limits<std::uint64_t>::max() / page * page;

    const std::vector<Wrong> wrongs = {
        {"reserve nothing", driver->reserve(0).status()},
        {"reserve half a page", driver->reserve(page / 2).status()},
        {"free an unknown range", driver->free_address(start + page, page)},
        {"free a part", driver->free_address(start, page)},
        {"free what is mapped", driver->free_address(start, 8 * page)},
        {"create nothing", driver->create(0).status()},
        {"create half a page", driver->create(page + page / 2).status()},
        {"release what is mapped", driver->release(used.id())},
        {"release the unknown", driver->release(987654321)},
        {"map the unknown", driver->map(start, 2 * page, 987654321)},
        {"map off the page", driver->map(start + page / 2, 2 * page, spare.id())},
        {"map another size", driver->map(start, page, spare.id())},
        {"map over a mapping", driver->map(start + 2 * page, 2 * page, spare.id())},
        {"map over a mapping's end", driver->map(start + 3 * page, 2 * page, spare.id())},
        {"map over a mapping's start", driver->map(start + page, 2 * page, spare.id())},
        {"map past the end", driver->map(start + 7 * page, 2 * page, spare.id())},
        {"map before the start", driver->map(start - page, 2 * page, spare.id())},
        {"map at nowhere", driver->map(0, 2 * page, spare.id())},
        {"map the end of the world", driver->map(most, 2 * page, spare.id())},
        {"access to nothing mapped", driver->set_access(start, 2 * page)},
        {"access to a part", driver->set_access(start + 2 * page, page)},
        {"access over the end", driver->set_access(start + 2 * page, most)},
        {"unmap nothing mapped", driver->unmap(start, 2 * page)},
        {"unmap a part", driver->unmap(start + 2 * page, page)},
        {"unmap too much", driver->unmap(start + 2 * page, 3 * page)},
    };
    for (const Wrong &wrong : wrongs) {
        if (wrong.status.code() != Code::invalid || wrong.status.message().size() < 20) {
            check::fail(__FILE__, __LINE__,
                        std::string(wrong.what) + ": " + code_name(wrong.status.code()) + " " + wrong.status.message());
        }
    }
    CHECK(driver->stats() == before);
    CHECK(all(subject, start + 2 * page, 0x77, 2 * page));
    const PhysicalId stale = spare.id();
    CHECK_OK(spare.close());
    CHECK_EQ(code_of(driver->release(stale)), "invalid");
    CHECK_EQ(code_of(driver->map(start, 2 * page, stale)), "invalid");
}

void memory_goes_back(const Subject &subject, const std::shared_ptr<Driver> &driver) {
    if (!subject.held) return;  // nobody can tell
    const std::uint64_t page = driver->granularity();
    const std::uint64_t before = subject.held(*driver);
    std::vector<std::unique_ptr<Place>> places;
    for (int i = 0; i < 4; ++i) {
        places.push_back(std::make_unique<Place>(place(driver, 2)));
        put(subject, places.back()->address(), 1, 2 * page);
    }
    CHECK_EQ(subject.held(*driver) - before, 8 * page);
    places.erase(places.begin() + 1);
    CHECK_EQ(subject.held(*driver) - before, 6 * page);
    CHECK_OK(places[0]->mapping.close());
    CHECK_EQ(subject.held(*driver) - before, 6 * page);  // unmapping alone frees nothing
    places.clear();
    CHECK_EQ(subject.held(*driver), before);
}

void running_out_is_an_answer(const Subject &subject, const std::shared_ptr<Driver> &driver) {
    const std::uint64_t page = driver->granularity();
    const std::uint64_t held = subject.held ? subject.held(*driver) : 0;
    const MemoryInfo info = must(driver->memory_info());
    Result<PhysicalId> tried = driver->create((info.total_bytes / page + 1) * page);
    CHECK_EQ(code_of(tried.status()), "out_of_memory");
    CHECK(tried.status().message().find("iB") != std::string::npos);
    CHECK(driver->stats() == DriverStats{});
    if (subject.held) CHECK_EQ(subject.held(*driver), held);
    Place made = place(driver, 1);
    CHECK(all(subject, made.address(), 0, page));
}

void threads_have_their_own_ranges(const Subject &subject, const std::shared_ptr<Driver> &driver) {
    constexpr int kThreads = 4;
    const int rounds = driver->granularity() < (1u << 20) ? 40 : 6;
    std::vector<std::string> troubles(kThreads);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
        threads.emplace_back([&, t] {
            try {
                CHECK_OK(driver->bind_thread());
                const auto value = static_cast<unsigned char>(t + 1);
                for (int round = 0; round < rounds; ++round) {
                    Place made = place(driver, static_cast<std::uint64_t>(1 + (round + t) % 4));
                    CHECK(all(subject, made.address(), 0, made.physical.bytes()));
                    put(subject, made.address(), value, made.physical.bytes());
                    CHECK(all(subject, made.address(), value, made.physical.bytes()));
                }
            } catch (const check::Failure &failure) {
                troubles[static_cast<std::size_t>(t)] = failure.text;
            }
        });
    }
    for (std::thread &thread : threads) thread.join();
    for (const std::string &trouble : troubles) CHECK_EQ(trouble, std::string());
    CHECK(driver->stats() == DriverStats{});
}

void fences_pass(const Subject &, const std::shared_ptr<Driver> &driver) {
    std::unique_ptr<Fence> fence = must(driver->record(0));
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (!must(fence->done())) {
        CHECK(std::chrono::steady_clock::now() < deadline);
        std::this_thread::yield();
    }
    CHECK(must(fence->done()));
}

void a_child_owns_nothing(const Subject &subject, const std::shared_ptr<Driver> &driver) {
    const std::uint64_t page = driver->granularity();
    Place made = place(driver, 2);
    put(subject, made.address(), 0x42, 2 * page);
    std::fflush(nullptr);
    const pid_t child = ::fork();
    if (child == 0) {
        int trouble = 0;
        if (driver->reserve(page).ok() || driver->create(page).ok()) trouble |= 1;
        if (!made.mapping.close().ok() || !made.physical.close().ok() || !made.reservation.close().ok()) trouble |= 2;
        if (!(driver->stats() == DriverStats{})) trouble |= 4;
        if (!subject.read && !unreadable(made.address())) trouble |= 8;
        ::_exit(trouble);
    }
    int status = 0;
    CHECK_EQ(::waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), 0);
    CHECK(all(subject, made.address(), 0x42, 2 * page));
}

// Builds and drops a small structure; every single call of it is made to fail once. Nothing may be left over.
void handles_undo(const Subject &, const std::shared_ptr<Driver> &driver) {
    auto faulty = std::make_shared<FaultyDriver>(driver);
    const std::uint64_t page = driver->granularity();
    const auto build = [&]() -> Status {
        auto range = Reservation::make(faulty, 4 * page);
        if (!range.ok()) return range.status();
        struct Piece {
            Physical memory;
            Mapping mapping;  // declared last, so that it goes first
        };
        std::vector<Piece> pieces;
        for (std::uint64_t i = 0; i < 4; ++i) {
            auto memory = Physical::make(faulty, page);
            if (!memory.ok()) return memory.status();
            auto mapping = Mapping::make(faulty, range->address() + i * page, page, memory->id());
            if (!mapping.ok()) return mapping.status();
            pieces.push_back({std::move(memory).value(), std::move(mapping).value()});
        }
        return {};
    };
    CHECK_OK(build());
    CHECK(driver->stats() == DriverStats{});
    const std::uint64_t leaked = leaked_calls();
    for (const Call call : {Call::reserve, Call::create, Call::map, Call::set_access}) {
        for (std::uint64_t nth = 1; nth <= (call == Call::reserve ? 1 : 4); ++nth) {
            faulty->fail(call, nth, Status(Code::driver, "injected"));
            const Status status = build();
            CHECK_EQ(code_of(status), "driver");
            CHECK_EQ(status.message(), std::string("injected"));
            CHECK(driver->stats() == DriverStats{});
        }
    }
    CHECK_EQ(leaked_calls(), leaked);
}

}  // namespace

bool unreadable(Address address) {
    int pipe_ends[2] = {-1, -1};
    if (::pipe2(pipe_ends, O_CLOEXEC) != 0) check::fail(__FILE__, __LINE__, "no file descriptors");
    // Not through the C library: a sanitizer would look at the bytes itself.
    const long wrote = ::syscall(SYS_write, pipe_ends[1], bytes_at(address), std::size_t{1});
    const int error = errno;
    ::close(pipe_ends[0]);
    ::close(pipe_ends[1]);
    return wrote < 0 && error == EFAULT;
}

bool add_driver_contract(const Subject &subject) {
    const std::pair<const char *, Body> bodies[] = {
        {"describes itself", describes_itself},
        {"reserves and frees addresses", reserves_addresses},
        {"maps, and memory keeps its contents", maps_and_keeps_contents},
        {"fresh memory reads as zero", fresh_memory_is_zero},
        {"access covers whole mappings", access_covers_whole_mappings},
        {"an unmapped address faults", unmapped_addresses_fault},
        {"wrong arguments change nothing", refuses_wrong_arguments},
        {"memory goes back when released", memory_goes_back},
        {"running out is an answer", running_out_is_an_answer},
        {"threads with their own ranges", threads_have_their_own_ranges},
        {"fences pass", fences_pass},
        {"a forked child owns nothing", a_child_owns_nothing},
        {"handles undo at every failing call", handles_undo},
    };
    for (const auto &[what, body] : bodies) {
        const auto test = [subject, run = body] {
            const std::shared_ptr<Driver> driver = subject.make();
            if (!driver) {
                std::printf("      skipped: there is no such device on this machine\n");
                return;
            }
            run(subject, driver);
            CHECK(driver->stats() == DriverStats{});
        };
        check::cases().push_back({"driver contract: " + subject.name + ": " + what, test});
    }
    return true;
}

}  // namespace elastickv::contract
