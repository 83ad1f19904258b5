// What stands in a ledger file, word for word.
//
// The constant part of the header is written before anybody can see the file and covered by a checksum. Everything
// after it is a single aligned atomic word, changed under the mutex unless a line says otherwise, so that a process
// may die between any two writes. No sums are stored. All times are CLOCK_MONOTONIC nanoseconds unless named unix.
#pragma once

#include <pthread.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>

#include "base/futex.hpp"
#include "ledger/ledger.hpp"

namespace elastickv::ledger {

using FutexWord = std::atomic<std::uint32_t>;
using Word = std::atomic<std::uint64_t>;
static_assert(sizeof(Word) == 8 && Word::is_always_lock_free);

inline constexpr std::uint64_t kMagic = 0x31766b6369747365;  // "estickv1", the file's first bytes
inline constexpr std::uint64_t kFormatVersion = 4;
inline constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 48;  // no amount in a ledger is larger
// The mutex lives in the file, so processes that share it must agree on its layout: this names the C library's.
inline constexpr std::uint64_t kLockAbi = 0x676c696263000000 + sizeof(pthread_mutex_t);  // "glibc"

// A text of up to N*8-1 bytes in atomic words.
template <std::size_t N> struct Text {
    std::array<Word, N> words;

    void store(const std::string &value) noexcept;  // cut to fit
    std::string load() const;
};

// An order, or the answer to one, with its revision, readable without the lock and never torn: the new pair is written
// beside the one in force, then `sequence` switches over. A writer that dies in between has changed nothing. Writers
// hold the mutex.
struct Revised {
    struct Pair {
        Word bytes, revision, now;
    };
    Word sequence;
    std::array<Pair, 2> pairs;

    void store(const Tenant::Limit &limit) noexcept;
    Tenant::Limit load() const noexcept;
};

// Measured times by bucket. Each sample is two additions without a lock: a process that dies between them leaves a
// bucket without its part of the sum.
struct Latencies {
    std::array<Word, std::tuple_size_v<decltype(Histogram::counts)>> counts;
    Word sum_ns;

    void add(std::uint64_t ns) noexcept;
    Histogram load() const noexcept;
    void clear() noexcept;
};

// Every format version has this header, so that a file of another version can be told from a damaged one.
struct ConstantHeader {
    std::uint64_t magic, version, header_bytes, row_bytes, rows, members, lock_abi;
    std::uint64_t alive_inode;  // of the device's "alive" file: another one would show everybody as dead
    std::array<char, 40> boot_id;
    std::array<char, 64> device;
    std::uint64_t checksum;  // of the bytes before it
};

struct Header {
    ConstantHeader constant;
    Word capacity;  // pack_capacity(): carries its own check bits
    Word unmanaged;
    Word revision;      // grows with every join, departure and limit order; limits take their revisions from it
    Word incarnations;  // last one given out
    Word tickets;       // last one given out
    Word demanders;     // hint: bit t is set when slot t may have a live demand
    Word owner_pid;     // hint: who took the mutex last; 0 when free
    Word repairs;       // how often the mutex was found with a dead owner
    FutexWord freed;    // rung when bytes come back; no lock
    FutexWord limits;   // rung when a limit or a trim is acknowledged or a tenant leaves; no lock
    alignas(64) pthread_mutex_t mutex;
};

enum class Naming : std::uint64_t {
    none = 0,
    lasting = 1,    // the name and its limit stay when the tenant has gone
    this_life = 2,  // they go with it
};

struct alignas(64) Row {
    // 0: no tenant holds the row. Written last by a join, first by a reaper.
    Word incarnation;
    Word named;  // a Naming: whether name and limit_wanted mean something, and for how long
    Text<8> name;
    Text<8> engine;
    Text<16> layout;
    Word pid, since_unix_ns, left_ns;
    Word floor, weight, priority, page_bytes;
    Word leased, static_bytes;  // grown under the mutex only; shrunk by the tenant without it
    Revised limit_wanted, limit_held;
    Revised trim_wanted, trim_done;  // `bytes` of the latter: given back
    Word demand, backlog, demand_ticket, demand_since_ns;
    Word demand_seen_ns;  // last refresh; 0: no demand, and no floor that is owed. Written last
    Word ask_open_ns;     // since when an ask has stood unanswered; 0: none
    Word ask_late_ns;     // the ask_open_ns that was counted as late
    Word active_ns;       // last time with pages in use or a lease granted; no lock
    Word virtual_bytes, used, cached, mapped_free, transit, leaving, pinned;  // published by the tenant; no lock
    Word misses, evicted_need, evicted_neighbour, evicted_limit, evicted_idle, evicted_budget;
    Word asked, answered, late;
    std::array<Latencies, kLatencies> latencies;  // added to by every member; no lock
    FutexWord bell;
    FutexWord unused;
    std::array<Word, kMaxMembers> mapped, static_used;  // per member process; no lock
};

struct File {
    Header header;
    std::array<Row, kMaxTenants> rows;
};
static_assert(std::is_standard_layout_v<File>);

// Capacity (< 2^48 bytes) with 16 check bits above it, so that one word can be changed at once and damage shows.
std::uint64_t pack_capacity(std::uint64_t bytes) noexcept;
// Returns false when the check bits do not fit the bytes.
bool unpack_capacity(std::uint64_t word, std::uint64_t &bytes) noexcept;

std::uint64_t header_checksum(const ConstantHeader &header) noexcept;
ConstantHeader make_constant_header(const std::string &boot_id, const std::string &device,
                                    std::uint64_t alive_inode) noexcept;

// Wipes what belongs to one life of a tenant (leases, demand, usage, open trims, measurements); keeps the name and the
// wanted limit. The order is such that a reader without the lock sees the row as dead first.
void clear_life(Row &row) noexcept;

template <std::size_t N> void Text<N>::store(const std::string &value) noexcept {
    std::array<char, N * 8> bytes{};
    value.copy(bytes.data(), bytes.size() - 1);
    for (std::size_t i = 0; i < N; ++i) {
        std::uint64_t word = 0;
        for (std::size_t b = 0; b < 8; ++b)
            word |= static_cast<std::uint64_t>(static_cast<unsigned char>(bytes[i * 8 + b])) << (8 * b);
        words[i].store(word, std::memory_order_relaxed);
    }
}

template <std::size_t N> std::string Text<N>::load() const {
    std::string value;
    for (const Word &cell : words) {
        const std::uint64_t word = cell.load(std::memory_order_relaxed);
        for (std::size_t b = 0; b < 8; ++b) {
            const char c = static_cast<char>(word >> (8 * b) & 0xff);
            if (c == '\0') return value;
            value.push_back(c);
        }
    }
    return value;
}

}  // namespace elastickv::ledger
