// Taking back what is on its way out.
//
// An extent that was ordered unmapped stays mapped on every rank until the fence of its order has passed. Where blocks
// are needed again before that, it is ordered to stay: no driver call and no lease, for both are as they were. A rank
// may have let go a moment before; then it says so, and the extent goes on its way, behind the same fence. Until every
// rank has answered, none of its blocks is handed out.

#include <algorithm>

#include "base/faultpoint.hpp"
#include "pool/pool.hpp"

namespace elastickv {

// Whether it is on its way out and, as far as can be seen from here, still there on every rank.
bool Pool::may_recall(std::uint32_t head) noexcept {
    const Extent &extent = extents_[head];
    if (extent.stage != Stage::unmapping || extent.goes) return false;
    const std::uint64_t ticket = table_->ticket(head).load(std::memory_order_relaxed);
    for (std::uint32_t rank = 0; rank < table_->ranks(); ++rank) {
        if (table_->rank(rank).fence_passed.load(std::memory_order_acquire) >= ticket) return false;
        const auto answer = Answer::unpack(table_->so(rank, head).load(std::memory_order_acquire));
        if (answer.generation == extent.generation) return false;
    }
    return true;
}

void Pool::order_recall(std::uint32_t head) {
    Extent &extent = extents_[head];
    const Run run{head, extent.pages};
    extent.stage = Stage::recalling;
    for (std::uint32_t block = first_block(head); block <= last_block(head + run.pages - 1); ++block) {
        missing_[block] = static_cast<std::uint16_t>(missing_[block] - pages_of_block_in(block, run));
        if (missing_[block] == 0 && block != 0) ++coming_;
    }
    held_pages_ += run.pages;
    usage_.leaving -= run.pages;
    const std::uint64_t ticket = table_->ticket(head).load(std::memory_order_relaxed);
    table_->order(head, {++extent.generation, run.pages, true, false, true}, ticket);
    (void)fault::point("pool.recall.ordered");
}

// Some rank had let go. Those that kept it unmap it behind the fence of the first order, for the work that this order
// waited for may still be under way; nothing has been put on it since.
void Pool::end_recall(std::uint32_t head) {
    Extent &extent = extents_[head];
    no_longer_coming(head);
    usage_.leaving += extent.pages;
    extent.stage = Stage::unmapping;
    extent.goes = true;
    const std::uint64_t ticket = table_->ticket(head).load(std::memory_order_relaxed);
    table_->order(head, {++extent.generation, extent.pages, false, true, true}, ticket);
    table_->ring_ranks();
}

// Has extents that are on their way out stay, the lowest first, until `n` blocks are free or coming. What a
// neighbour waits for, what was given for a trim, and what is above the limit goes on its way.
void Pool::recall(std::uint32_t n) {
    if (usage_.leaving == 0 || free_blocks_.count() + coming_ >= n || leases_.pressed()) return;
    std::vector<std::uint32_t> heads;
    for (const std::uint32_t head : transit_)
        if (may_recall(head)) heads.push_back(head);
    std::sort(heads.begin(), heads.end());
    bool any = false;
    for (const std::uint32_t head : heads) {
        if (free_blocks_.count() + coming_ >= n) break;
        if (leases_.over_limit(held_pages_ + lost_pages_ + extents_[head].pages, false) != 0) continue;
        order_recall(head);
        any = true;
    }
    if (!any) return;
    table_->ring_ranks();
    publish();
}

// What recall() could have stay now.
std::uint64_t Pool::recallable_pages() noexcept {
    if (usage_.leaving == 0 || leases_.pressed()) return 0;
    std::uint64_t pages = 0;
    for (const std::uint32_t head : transit_)
        if (may_recall(head)) pages += extents_[head].pages;
    return pages - std::min(pages, leases_.over_limit(held_pages_ + lost_pages_ + pages, false));
}

}  // namespace elastickv
