// The stand-in's control functions; standin.h says what they do.
#include <unistd.h>

#include <string>

#include "standin.h"
#include "state.hpp"

using standin::State;
using standin::state;

STANDIN_EXPORT void standin_reset(int devices, uint64_t total_bytes, uint64_t granularity, int version) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    standin::reset(all, devices, total_bytes, granularity, version);
}

STANDIN_EXPORT void standin_start_engine(int device) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    if (all.pid == -1) standin::reset(all, 0, 0, 0, 0);
    all.devices.at(static_cast<std::size_t>(device)).engine = true;
}

STANDIN_EXPORT int standin_context_references(int device) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    return all.devices.at(static_cast<std::size_t>(device)).references;
}

STANDIN_EXPORT void standin_fail(const char *function, int nth, int code) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    standin::Switch &order = all.switches[function];
    order.failures[order.calls + static_cast<std::uint64_t>(nth < 1 ? 1 : nth)] = code;
}

STANDIN_EXPORT void standin_fail_any(int nth, int code) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    all.any.failures[all.any.calls + static_cast<std::uint64_t>(nth < 1 ? 1 : nth)] = code;
}

STANDIN_EXPORT uint64_t standin_all_calls(void) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    return all.any.calls;
}

STANDIN_EXPORT int standin_pending(void) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    std::size_t orders = all.any.failures.size();
    for (const auto &[name, order] : all.switches) orders += order.failures.size();
    return static_cast<int>(orders);
}

STANDIN_EXPORT void standin_heal(void) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    all.any.failures.clear();
    for (auto &[name, order] : all.switches) order.failures.clear();
}

STANDIN_EXPORT void standin_delay(const char *function, unsigned microseconds) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    all.switches[function].delay_us = microseconds;
}

STANDIN_EXPORT uint64_t standin_calls(const char *function) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    return all.switches[function].calls;
}

STANDIN_EXPORT void standin_hold(void *stream, int held) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    standin::Stream *found = standin::stream_of(all, stream);
    if (found == nullptr) return standin::violation(all, "a stream was held that does not exist");
    found->held = held != 0;
    if (held == 0) standin::let_go(all, *found);
}

STANDIN_EXPORT void standin_hold_new_streams(int held) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    all.hold_new = held != 0;
}

STANDIN_EXPORT void standin_hold_all(void) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    all.hold_new = all.legacy.held = true;
    for (auto &[handle, stream] : all.streams) stream->held = true;
}

STANDIN_EXPORT void standin_let_all_go(void) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    all.hold_new = false;
    all.legacy.held = false;
    standin::let_go(all, all.legacy);
    for (auto &[handle, stream] : all.streams) {
        stream->held = false;
        standin::let_go(all, *stream);
    }
}

STANDIN_EXPORT void standin_work(void *stream, uint64_t address, uint64_t bytes) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    standin::Stream *found = standin::stream_of(all, stream);
    if (found == nullptr) return standin::violation(all, "work on a stream that does not exist");
    standin::enqueue(all, *found, {standin::Item::Kind::work, address, bytes, 0, nullptr, 0});
}

STANDIN_EXPORT void standin_strict(int strict) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    all.strict = strict != 0;
}

STANDIN_EXPORT uint64_t standin_violations(void) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    return all.violations;
}

STANDIN_EXPORT const char *standin_last_violation(void) {
    thread_local std::string text;
    State &all = state();
    std::lock_guard guard(all.mutex);
    text = all.last_violation;
    return text.c_str();
}

STANDIN_EXPORT uint64_t standin_used_bytes(int device) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    return all.devices.at(static_cast<std::size_t>(device)).used;
}

STANDIN_EXPORT uint64_t standin_alive(const char *kind) {
    State &all = state();
    std::lock_guard guard(all.mutex);
    const std::string wanted = kind;
    if (wanted == "reservations") return all.reservations.size();
    if (wanted == "memory") return all.memory.size();
    if (wanted == "mappings") return all.mappings.size();
    if (wanted == "streams") return all.streams.size();
    if (wanted == "events") return all.events.size();
    return ~uint64_t{0};
}
