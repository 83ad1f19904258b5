// A rank's memory: one reserved range and the thread (the mapper) that makes it what the page table wants.
//
// The mapper takes no lock of the scheduling process and runs no Python. It maps as soon as it is told, and unmaps
// once the fence of the order has passed. Each extent is mapped whole in every span or, if any call fails, not at all.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/origin.hpp"
#include "base/status.hpp"
#include "driver/driver.hpp"
#include "driver/handles.hpp"
#include "memory/page_table.hpp"

namespace elastickv {

struct RankOptions {
    std::uint32_t rank = 0;
    std::uint64_t spans = 1;       // stripes side by side in one reservation
    std::uint64_t span_bytes = 0;  // bytes of a stripe; a multiple of the page when there are several
    std::uint64_t page_bytes = 0;  // this rank's piece of one page of the table, in each span
    std::uint64_t deadline_ms = 10000;
    std::uint64_t reclaim_ms = 200;  // how long a mapping without memory waits for what others of this process give up
};

// What the mapper reports to the ledger: bytes newly mapped (positive) or unmapped (negative), and leases to return.
struct RankHooks {
    std::function<void(std::int64_t)> mapped;
    std::function<void(std::uint64_t)> give;
    // One extent was mapped (true) or unmapped, which took so many ns with all its driver calls.
    std::function<void(bool, std::uint64_t)> took = {};
};

class Rank {
  public:
    static Result<std::unique_ptr<Rank>> attach(std::shared_ptr<Driver> driver, std::shared_ptr<PageTable> table,
                                                const RankOptions &options, RankHooks hooks);
    ~Rank();
    Rank(const Rank &) = delete;
    Rank &operator=(const Rank &) = delete;

    Address address() const noexcept { return reservation_.address(); }
    std::uint64_t bytes() const noexcept { return options_.spans * options_.span_bytes; }
    const std::shared_ptr<Driver> &driver() const noexcept { return driver_; }

    // An order to unmap up to `ticket` has arrived, before the next work is launched on `stream`. Returns at once.
    // A driver that cannot record a fence now is asked again later: a later point of the stream is as good.
    Status fence(std::uint64_t ticket, std::uint64_t stream);

    // Memory that this process caches for itself (PyTorch's free blocks) is given back before a mapping fails for want
    // of memory. Whoever can do that says so, waits for the request, does it, and answers with the request's number;
    // the mapper waits for reclaim_ms at most, once a second at most, and runs none of it itself.
    void offer_reclaim(bool offered) noexcept;
    // The newest request's number, as soon as it is not `seen` or after the time.
    std::uint32_t wait_reclaim(std::uint32_t seen, std::uint64_t timeout_us) const noexcept;
    void reclaimed(std::uint32_t request) noexcept;
    // Waits until the extent that starts at page 0 is mapped; timeout text says what is missing.
    Status wait_first_page(std::uint64_t timeout_ms) const;
    std::uint64_t mapped_bytes() const noexcept;
    // Stops the mapper and unmaps everything (idempotent). Nothing may use the addresses afterwards.
    void close() noexcept;

  private:
    struct Piece {  // the mapping is declared last, so that it goes before its memory
        Physical memory;
        Mapping mapping;
    };
    struct Extent {
        std::uint32_t pages = 0;
        std::vector<Piece> pieces;  // one per span
        bool torn = false;          // the driver let go of a part of it, or may have
    };
    struct Clearing {  // an extent that is mapped and not answered yet, for its memory is still being cleared
        std::uint32_t page = 0, generation = 0;
        std::uint64_t since_ns = 0;
        std::vector<std::unique_ptr<Fence>> fences;
    };
    struct PendingFence {
        std::uint64_t ticket;
        std::uint64_t stream;
        std::unique_ptr<Fence> fence;  // null: not recorded yet
    };

    Rank(std::shared_ptr<Driver> driver, std::shared_ptr<PageTable> table, const RankOptions &options, RankHooks hooks);
    void run() noexcept;
    bool bind() noexcept;
    bool record_front() noexcept;
    bool reclaim() noexcept;
    bool drain_ring() noexcept;
    bool poll_fences() noexcept;
    bool retry_waiting() noexcept;
    void look_at(std::uint32_t page) noexcept;
    void map_extent(std::uint32_t page, const Wanted &wanted) noexcept;
    void unmap_extent(std::uint32_t page, const Wanted &wanted) noexcept;
    void recall_extent(std::uint32_t page, const Wanted &wanted) noexcept;
    Status map_pieces(std::uint32_t page, Extent &extent, std::vector<std::unique_ptr<Fence>> &clearing);
    Status map_or_undo(std::uint32_t page, Extent &extent, std::vector<std::unique_ptr<Fence>> &clearing, bool *undone);
    static Status take_down(Extent &extent) noexcept;
    void keep(std::uint32_t page, Extent extent) noexcept;
    bool poll_clearing() noexcept;
    bool being_cleared(std::uint32_t page, std::uint32_t generation) const noexcept;
    std::uint64_t deadline_ns() const noexcept;
    void wait_cleared(std::vector<std::unique_ptr<Fence>> &fences, std::uint64_t until_ns) const noexcept;
    void count(bool mapped, std::uint64_t start_ns) noexcept;
    void answer(std::uint32_t page, std::uint32_t generation, So so) noexcept;
    void note_failure(const std::string &text) noexcept;
    std::uint64_t extent_bytes(std::uint32_t pages) const noexcept {
        return options_.page_bytes * pages * options_.spans;
    }
    Address address_of(std::uint32_t page, std::uint64_t span) const noexcept {
        return address() + span * options_.span_bytes + page * options_.page_bytes;
    }

    const Origin origin_;
    std::shared_ptr<Driver> driver_;
    std::shared_ptr<PageTable> table_;
    RankOptions options_;
    RankHooks hooks_;
    Reservation reservation_;
    RankSlot &slot_;

    std::unordered_map<std::uint32_t, Extent> extents_;  // mapper's own
    std::vector<std::uint32_t> waiting_;                 // pages whose unmap waits for its fence
    std::deque<Clearing> clearing_;                      // oldest first
    std::uint64_t cursor_ = 0;
    bool bound_ = false;
    std::uint64_t reclaim_again_ns_ = 0;
    std::mutex failure_mutex_;  // over the slot's text
    std::mutex fences_mutex_;
    std::deque<PendingFence> fences_;
    std::uint64_t fence_again_ns_ = 0;  // after a failure
    std::atomic<bool> reclaim_offered_{false};
    std::atomic<std::uint32_t> reclaim_asked_{0}, reclaim_done_{0};
    std::atomic<bool> stop_{false};
    std::thread thread_;
};

}  // namespace elastickv
