// The state of the stand-in for libcuda.so.1. Everything is behind one lock; the entry points are in cuda.cpp and
// memory.cpp.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "driver/cuda_table.hpp"

namespace standin {

namespace cuda = elastickv::cuda;  // only its type declarations: the stand-in links nothing of the core

inline constexpr int kInvalidValue = 1;
inline constexpr int kNotInitialized = 3;
inline constexpr int kInvalidDevice = 101;
inline constexpr int kInvalidContext = 201;
inline constexpr int kAlreadyMapped = 208;
inline constexpr int kInvalidHandle = 400;
inline constexpr int kIllegalAddress = 700;

struct Context {
    int device = 0;
};
struct Device {
    Context context;
    bool engine = false;  // an engine has made the primary context active
    int references = 0;
    std::uint64_t used = 0;
};
struct Memory {
    int fd = -1;
    std::uint64_t bytes = 0;
    int device = 0;
    int mappings = 0;
    bool released = false;  // goes with its last mapping
};
struct Mapping {
    std::uint64_t bytes = 0;
    cuda::Handle handle = 0;
    bool access = false;
};

// One thing on a stream: a fill, work that touches a range, or an event.
struct Item {
    enum class Kind { fill, work, event } kind = Kind::work;
    std::uint64_t address = 0;
    std::uint64_t bytes = 0;
    unsigned char value = 0;
    void *event = nullptr;
    std::uint64_t generation = 0;  // of the event when it was recorded
};
struct Stream {
    bool held = false;
    std::deque<Item> items;
};
struct Event {
    std::uint64_t recorded = 0;   // generation of the last recording
    std::uint64_t completed = 0;  // the newest generation that has completed
};

struct Switch {
    std::uint64_t calls = 0;
    std::map<std::uint64_t, int> failures;  // by number of call
    unsigned delay_us = 0;
};

struct State {
    std::mutex mutex;
    pid_t pid = -1;
    bool initialized = false;
    std::uint64_t total = 0;
    std::uint64_t granularity = 0;
    int version = 0;
    std::deque<Device> devices;  // a deque: contexts are pointers into it
    std::map<std::uint64_t, std::uint64_t> reservations;
    std::map<std::uint64_t, Mapping> mappings;
    std::map<cuda::Handle, Memory> memory;
    std::uint64_t next_handle = 1;
    Stream legacy;  // stream 0
    std::map<void *, std::unique_ptr<Stream>> streams;
    std::map<void *, std::unique_ptr<Event>> events;
    bool hold_new = false;
    bool strict = false;
    std::uint64_t violations = 0;
    std::string last_violation;
    std::map<std::string, Switch> switches;
    Switch any;  // of all functions together
};
State &state();

// All below require the lock.
void reset(State &all, int devices, std::uint64_t total, std::uint64_t granularity, int version);
Stream *stream_of(State &all, void *handle);  // null: no such stream
void enqueue(State &all, Stream &stream, const Item &item);
void let_go(State &all, Stream &stream);
void violation(State &all, const std::string &text);
// Whether the whole range is mapped and accessible.
bool accessible(const State &all, std::uint64_t address, std::uint64_t bytes);
// Counts as a violation what is still enqueued on the range, or (strict) any event that has not completed.
void check_quiet(State &all, std::uint64_t address, std::uint64_t bytes);
void drop_memory(State &all, std::map<cuda::Handle, Memory>::iterator memory);

// At the start of each entry point: counts the call, sleeps and fails as ordered. `code` is what to return where that
// is not 0.
class Entry {
  public:
    explicit Entry(const char *function, bool needs_context = false);
    Entry(const Entry &) = delete;
    Entry &operator=(const Entry &) = delete;
    int code() const { return code_; }
    State &all() { return all_; }

  private:
    State &all_;
    std::unique_lock<std::mutex> lock_;
    int code_ = 0;
};

Context *&current_context();  // of the calling thread

}  // namespace standin

#define STANDIN_EXPORT extern "C" __attribute__((visibility("default")))
