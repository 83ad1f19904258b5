// Every fault point of the core, in one place. A name that is not here does not compile; a name that is here and stands
// nowhere, or that no test reaches, fails a test. docs/faults.md shows this list.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>

namespace elastickv::fault {

struct PointInfo {
    std::string_view name;  // "part.step.moment"
    bool can_fail;          // does the step have a failure path of its own?
    std::string_view what;
};

inline constexpr std::array kPoints = std::to_array<PointInfo>({
    // the ledger's files
    {"files.open", true, "before a file of the directory is opened; fails as without descriptors (EMFILE)"},
    {"files.create", true, "before a file is created; fails as on a full disk (ENOSPC)"},
    {"files.allocate", true, "a new file is there and has no blocks yet; fails as on a full disk (ENOSPC)"},
    {"files.lock", true, "before the directory's lock is taken; fails as if another held it to the deadline"},
    {"ledger.create.before_publish", true, "the new table is whole and has no name yet; fails as a denied rename"},
    {"ledger.create.published", false, "the new table has its name"},
    {"ledger.open.mapped", false, "the table is mapped and its header checked"},
    // the ledger's mutex
    {"ledger.lock.wait", true, "before the mutex is taken; fails as if another held it to the deadline"},
    {"ledger.lock.taken", false, "the mutex is held, its owner is not named yet"},
    {"ledger.lock.repair", false, "the last owner died with the mutex; nothing is repaired yet"},
    {"ledger.lock.release", false, "the owner's name is gone, the mutex is still held"},
    // tenants come and go
    {"ledger.join.locked", false, "the tenant's byte is locked, its row is as it was"},
    {"ledger.join.named", false, "the row carries the name and belongs to nobody"},
    {"ledger.join.written", false, "the row is written and still says \"nobody\""},
    {"ledger.join.done", false, "the row lives"},
    {"ledger.attach.locked", false, "another process of the tenant has locked its byte"},
    {"ledger.leave.locked", false, "a process leaves: the mutex is held, its byte still locked"},
    {"ledger.leave.unlocked", false, "its byte is free, the row not yet emptied"},
    {"ledger.bury.cleared", false, "a dead tenant's row is empty, the waiters have not been told"},
    // leases and limits
    {"ledger.lease.begin", true, "before a lease is asked for; fails as a refusal"},
    {"ledger.lease.locked", false, "a lease is asked for, with the mutex"},
    {"ledger.lease.decided", false, "the lease will be granted"},
    {"ledger.lease.granted", false, "the bytes are on the row, the demand still stands"},
    {"ledger.lease.demanded", false, "the lease is refused and the demand recorded, nobody has been rung"},
    {"ledger.give.begin", false, "before bytes are given back"},
    {"ledger.give.done", false, "the bytes are off the row, the waiters have not been told"},
    {"ledger.limit.ordered", false, "a new limit stands, its tenant has not been rung"},
    {"ledger.limit.held", false, "a limit is acknowledged, the one who waits for it has not been told"},
    {"ledger.trim.ordered", false, "a trim is ordered, its tenant has not been rung"},
    {"ledger.trim.done", false, "a trim is answered, the one who waits for it has not been told"},
    // the page table and the ranks
    {"memory.table.create", true, "before the page table is made; fails as on a full disk (ENOSPC)"},
    {"memory.table.open", true, "before a rank opens the page table; fails as a file that is gone (ENOENT)"},
    {"memory.order.written", false, "an order stands in its word and not yet in the ring"},
    {"memory.order.placed", false, "an order stands in the ring, the ranks have not been rung"},
    {"memory.rank.reserved", false, "a rank has reserved its range and is not attached yet"},
    {"memory.map.begin", true, "before an extent is mapped; fails as a device without memory"},
    {"memory.map.created", true, "a piece of the extent has memory and no address; fails as a refused mapping"},
    {"memory.map.mapped", false, "the extent is mapped and not reported"},
    {"memory.map.answered", false, "the pool has its answer"},
    {"memory.unmap.begin", true, "before an extent is unmapped; fails as a driver that does not let go"},
    {"memory.unmap.unmapped", false, "a piece has lost its addresses and still has memory"},
    {"memory.unmap.released", false, "the memory is back, the pool has no answer yet"},
    {"memory.unmap.answered", false, "the pool has its answer, the lease is not given back"},
    {"memory.recall.begin", true, "before a rank keeps an extent that was to go; fails as one that is not whole"},
    {"memory.fence.passed", false, "a fence has passed, what waits for it is still mapped"},
    // the pool
    {"pool.grow.begin", true, "before more pages are leased; fails as \"none now\""},
    {"pool.grow.leased", false, "the pages are leased and not ordered"},
    {"pool.map.ordered", false, "an extent is ordered mapped"},
    {"pool.map.settled", false, "an extent is known to be mapped on all ranks"},
    {"pool.unmap.ordered", false, "an extent is ordered unmapped"},
    {"pool.unmap.settled", false, "an extent is known to be gone on all ranks"},
    {"pool.recall.ordered", false, "an extent on its way out is ordered to stay"},
    {"pool.recall.settled", false, "an extent is known to have stayed on all ranks"},
    {"pool.evict.cleared", false, "an extent's cached blocks are dropped, it is not ordered unmapped"},
    {"pool.take.done", false, "blocks are taken and not published"},
    {"pool.release.done", false, "blocks are released and not published"},
});

// Where the name stands in the list; kPoints.size() when it does not.
constexpr std::size_t find_point(std::string_view name) noexcept {
    std::size_t index = 0;
    while (index < kPoints.size() && kPoints.at(index).name != name) ++index;
    return index;
}

}  // namespace elastickv::fault
