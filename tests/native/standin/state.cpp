#include "state.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <iterator>
#include <thread>

namespace standin {

namespace {

void *pointer(std::uint64_t address) { return reinterpret_cast<void *>(static_cast<std::uintptr_t>(address)); }

bool overlap(std::uint64_t a, std::uint64_t a_bytes, std::uint64_t b, std::uint64_t b_bytes) {
    return a < b + b_bytes && b < a + a_bytes;
}

bool event_pending(const State &all, const Item &item) {
    auto found = all.events.find(item.event);
    return item.kind == Item::Kind::event && found != all.events.end() && found->second->completed < item.generation;
}

void carry_out(State &all, const Item &item) {
    if (item.kind == Item::Kind::event) {
        auto found = all.events.find(item.event);
        if (found != all.events.end()) found->second->completed = item.generation;
        return;
    }
    if (!accessible(all, item.address, item.bytes)) {
        violation(all, "work on a range that is not mapped when it runs");
    } else if (item.kind == Item::Kind::fill) {
        std::memset(pointer(item.address), item.value, item.bytes);
    }
}

}  // namespace

State &state() {
    static auto *all = new State;  // never destroyed: threads may outlive main()
    return *all;
}

Context *&current_context() {
    thread_local Context *current = nullptr;
    return current;
}

void reset(State &all, int devices, std::uint64_t total, std::uint64_t granularity, int version) {
    if (all.pid == ::getpid()) {
        for (const auto &[address, bytes] : all.reservations) ::munmap(pointer(address), bytes);
    }
    for (const auto &[handle, memory] : all.memory) ::close(memory.fd);
    all.pid = ::getpid();
    all.initialized = false;
    all.total = total == 0 ? std::uint64_t{256} << 20 : total;
    all.granularity = granularity == 0 ? std::uint64_t{2} << 20 : granularity;
    all.version = version == 0 ? 13000 : version;
    all.devices.clear();
    all.devices.resize(static_cast<std::size_t>(devices == 0 ? 3 : devices));
    for (std::size_t i = 0; i < all.devices.size(); ++i) all.devices[i].context.device = static_cast<int>(i);
    all.reservations.clear();
    all.mappings.clear();
    all.memory.clear();
    all.legacy = {};
    all.streams.clear();
    all.events.clear();
    all.hold_new = all.strict = false;
    all.violations = 0;
    all.last_violation.clear();
    all.switches.clear();
    all.any = {};
    current_context() = nullptr;
}

Stream *stream_of(State &all, void *handle) {
    if (handle == nullptr) return &all.legacy;
    auto found = all.streams.find(handle);
    return found == all.streams.end() ? nullptr : found->second.get();
}

void enqueue(State &all, Stream &stream, const Item &item) {
    stream.items.push_back(item);
    if (!stream.held) let_go(all, stream);
}

void let_go(State &all, Stream &stream) {
    while (!stream.items.empty()) {
        carry_out(all, stream.items.front());
        stream.items.pop_front();
    }
}

void violation(State &all, const std::string &text) {
    ++all.violations;
    all.last_violation = text;
}

bool accessible(const State &all, std::uint64_t address, std::uint64_t bytes) {
    auto it = all.mappings.upper_bound(address);
    if (it == all.mappings.begin()) return false;
    --it;
    std::uint64_t reached = address;
    for (; it != all.mappings.end() && reached < address + bytes; ++it) {
        if (it->first > reached || it->first + it->second.bytes <= reached || !it->second.access) return false;
        reached = it->first + it->second.bytes;
    }
    return reached >= address + bytes;
}

void check_quiet(State &all, std::uint64_t address, std::uint64_t bytes) {
    const auto check = [&](const Stream &stream) {
        for (const Item &item : stream.items) {
            if (item.kind != Item::Kind::event && overlap(address, bytes, item.address, item.bytes)) {
                violation(all, "a range was unmapped with work on it that has not completed");
            }
            if (all.strict && event_pending(all, item)) {
                violation(all, "a range was unmapped while a recorded event had not completed");
            }
        }
    };
    check(all.legacy);
    for (const auto &[handle, stream] : all.streams) check(*stream);
}

void drop_memory(State &all, std::map<cuda::Handle, Memory>::iterator memory) {
    ::close(memory->second.fd);
    all.devices[static_cast<std::size_t>(memory->second.device)].used -= memory->second.bytes;
    all.memory.erase(memory);
}

Entry::Entry(const char *function, bool needs_context) : all_(state()), lock_(all_.mutex) {
    Switch &order = all_.switches[function];
    for (Switch *counted : {&order, &all_.any}) {
        const auto found = counted->failures.find(++counted->calls);
        if (found == counted->failures.end()) continue;
        code_ = found->second;
        counted->failures.erase(found);
    }
    if (const unsigned delay = order.delay_us; delay != 0) {
        lock_.unlock();
        std::this_thread::sleep_for(std::chrono::microseconds(delay));
        lock_.lock();
    }
    if (code_ != 0) return;
    if (!all_.initialized || all_.pid != ::getpid()) {
        code_ = kNotInitialized;
    } else if (needs_context && current_context() == nullptr) {
        code_ = kInvalidContext;
    }
}

}  // namespace standin
