// The page table: what is wanted of each page and what is so, shared by the process that schedules and its ranks.
//
// It lives in a memfd of the scheduling process; ranks open it through /proc/<pid>/fd/<n>, so no file can be left
// behind. One writer a word: the pool writes `wanted`, rank r writes `so(r)`. Only the first page of an extent
// carries a word that counts; the word holds the extent's length. A generation in both words tells an answer to this
// order from an answer to an older one, and lets a process die between any two instructions.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "base/origin.hpp"
#include "base/status.hpp"

namespace elastickv {

enum class So : std::uint8_t { unmapped = 0, mapped = 1, failed = 2, stuck = 3 };

// Order to the ranks about one extent. Packed into one atomic word.
struct Wanted {
    std::uint32_t generation = 0;
    std::uint32_t pages = 0;  // length of the extent, < 2^24
    bool map = false;         // else: unmap
    bool fenced = false;      // unmap only behind the fence of its ticket
    // To map: keep what is there still, and map nothing. To unmap, after such an order: only who kept it has a lease of
    // it to give back, for the others gave theirs when they let go.
    bool recall = false;

    std::uint64_t pack() const noexcept {
        return (std::uint64_t{generation} << 32) | (std::uint64_t{pages} << 8) | (map ? 1U : 0U) | (fenced ? 2U : 0U) |
               (recall ? 4U : 0U);
    }
    static Wanted unpack(std::uint64_t word) noexcept {
        return {static_cast<std::uint32_t>(word >> 32), static_cast<std::uint32_t>((word >> 8) & 0xFFFFFFU),
                (word & 1U) != 0, (word & 2U) != 0, (word & 4U) != 0};
    }
};

struct Answer {
    std::uint32_t generation = 0;
    So so = So::unmapped;

    std::uint64_t pack() const noexcept { return (std::uint64_t{generation} << 32) | static_cast<std::uint8_t>(so); }
    static Answer unpack(std::uint64_t word) noexcept {
        return {static_cast<std::uint32_t>(word >> 32), static_cast<So>(word & 0xFFU)};
    }
};

enum class RankState : std::uint32_t { absent = 0, attached = 1, failed = 2, gone = 3 };

struct RankSlot {
    std::atomic<std::uint32_t> state;
    std::atomic<std::uint32_t> reserved;
    std::atomic<std::uint64_t> fence_passed;  // highest ticket whose fence this rank's device has passed
    std::atomic<std::uint64_t> mapped_bytes;
    std::atomic<std::uint64_t> giving;  // bytes that are answered to be unmapped, their lease not yet back
    std::atomic<std::uint64_t> map_ns, unmap_ns, maps, unmaps, failures;
    char error[256];  // text of the last failure; written before `failures` grows
};

struct PageTableHeader {
    std::uint64_t magic;
    std::uint32_t version;
    std::uint32_t ranks;
    std::uint64_t pages;
    std::uint64_t ring_size;    // a power of two
    std::uint64_t incarnation;  // of the tenant
    std::atomic<std::uint64_t> ring_tail;
    std::atomic<std::uint64_t> ticket;       // newest fenced unmap order
    std::atomic<std::uint32_t> order_bell;   // rung by the pool: ranks look at the ring
    std::atomic<std::uint32_t> answer_bell;  // rung by ranks: the pool looks at the answers
    std::atomic<std::uint32_t> closed;       // the pool is gone: ranks unmap everything
    std::uint32_t padding;
};

class PageTable {
  public:
    static Result<std::shared_ptr<PageTable>> create(std::uint64_t pages, std::uint32_t ranks,
                                                     std::uint64_t incarnation);
    // `path`: as path() of the creator said. corrupt: not a page table of this version and incarnation.
    static Result<std::shared_ptr<PageTable>> open(const std::string &path, std::uint64_t incarnation);
    ~PageTable();
    PageTable(const PageTable &) = delete;
    PageTable &operator=(const PageTable &) = delete;

    std::string path() const;  // for other processes while this one lives
    std::uint64_t pages() const noexcept { return header_->pages; }
    std::uint32_t ranks() const noexcept { return header_->ranks; }
    PageTableHeader &header() noexcept { return *header_; }
    RankSlot &rank(std::uint32_t rank) noexcept { return rank_slots_[rank]; }
    std::atomic<std::uint64_t> &wanted(std::uint64_t page) noexcept { return wanted_[page]; }
    std::atomic<std::uint64_t> &ticket(std::uint64_t page) noexcept { return tickets_[page]; }
    std::atomic<std::uint64_t> &so(std::uint32_t rank, std::uint64_t page) noexcept {
        return so_[rank * header_->pages + page];
    }

    // Pool side: publishes an order and wakes the ranks. `ticket` counts only for fenced unmaps; a recall leaves it.
    void order(std::uint64_t page, const Wanted &wanted, std::uint64_t ticket) noexcept;
    void ring_ranks() noexcept;
    // Rank side: the page in ring position `position`.
    std::uint32_t ring_at(std::uint64_t position) const noexcept;

  private:
    PageTable() = default;
    void lay_out() noexcept;

    const Origin origin_;  // a forked child orders nothing: the ranks are its parent's
    int file_ = -1;
    bool owner_ = false;
    void *base_ = nullptr;
    std::uint64_t bytes_ = 0;
    PageTableHeader *header_ = nullptr;
    RankSlot *rank_slots_ = nullptr;
    std::atomic<std::uint64_t> *wanted_ = nullptr, *tickets_ = nullptr, *so_ = nullptr;
    std::atomic<std::uint32_t> *ring_ = nullptr;
};

}  // namespace elastickv
