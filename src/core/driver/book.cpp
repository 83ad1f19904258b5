#include "driver/book.hpp"

#include <iterator>
#include <string>

#include "driver/text.hpp"

namespace elastickv {

namespace {

std::string range_text(Address address, std::uint64_t bytes) {
    std::string text("[");
    text.append(hex(address)).append(", +").append(human_bytes(bytes)).append(")");
    return text;
}
Status invalid(std::string text) { return {Code::invalid, std::move(text)}; }

}  // namespace

Status Book::check_size(const char *call, std::uint64_t bytes) const {
    if (bytes != 0 && bytes % granularity_ == 0) return {};
    return invalid(std::string(call) + ": " + std::to_string(bytes) +
                   " bytes is not a positive multiple of the page, " + human_bytes(granularity_) +
                   "; round the size up to whole pages");
}

// Size, alignment, and inside one reservation. Requires the lock.
Status Book::check_range(const char *call, Address address, std::uint64_t bytes) const {
    if (Status status = check_size(call, bytes); !status.ok()) return status;
    if (address % granularity_ != 0) {
        return invalid(std::string(call) + ": address " + hex(address) + " is not a multiple of the page, " +
                       human_bytes(granularity_));
    }
    auto after = reservations_.upper_bound(address);
    if (after != reservations_.begin()) {
        const auto &[start, length] = *std::prev(after);
        if (address - start < length && bytes <= length - (address - start)) return {};
    }
    return invalid(std::string(call) + ": the range " + range_text(address, bytes) +
                   " does not lie inside one reservation of this driver; reserve() it first");
}

// Nothing mapped or being mapped in the range. Requires the lock.
Status Book::check_free(Address address, std::uint64_t bytes) const {
    auto next = mappings_.lower_bound(address);
    auto hit = mappings_.end();
    if (next != mappings_.end() && next->first - address < bytes) hit = next;
    if (next != mappings_.begin()) {
        auto before = std::prev(next);
        if (address - before->first < before->second.bytes) hit = before;
    }
    if (hit == mappings_.end()) return {};
    return invalid("the range " + range_text(address, bytes) + " overlaps the mapping " +
                   range_text(hit->first, hit->second.bytes) + "; unmap that first");
}

Status Book::add_reservation(Address address, std::uint64_t bytes) {
    return no_throw([&]() -> Status {
        std::lock_guard guard(mutex_);
        reservations_.emplace(address, bytes);
        ++stats_.reservations;
        stats_.reserved_bytes += bytes;
        return {};
    });
}

Status Book::take_reservation(Address address, std::uint64_t bytes) {
    std::lock_guard guard(mutex_);
    auto found = reservations_.find(address);
    if (found == reservations_.end() || found->second != bytes) {
        return invalid("free_address: " + range_text(address, bytes) +
                       " is not a reservation of this driver; give the address and size that reserve() had");
    }
    if (Status status = check_free(address, bytes); !status.ok()) {
        return invalid("free_address: " + status.message());
    }
    reservations_.erase(found);
    --stats_.reservations;
    stats_.reserved_bytes -= bytes;
    return {};
}

Result<PhysicalId> Book::add_memory(std::uint64_t bytes, std::uint64_t key, bool cleared) {
    return no_throw([&]() -> Result<PhysicalId> {
        std::lock_guard guard(mutex_);
        const PhysicalId id = next_id_;
        memory_.emplace(id, Memory{bytes, key, 0, cleared});
        ++next_id_;
        ++stats_.physicals;
        stats_.created_bytes += bytes;
        return id;
    });
}

Result<Book::Memory> Book::take_memory(PhysicalId id) {
    std::lock_guard guard(mutex_);
    auto found = memory_.find(id);
    if (found == memory_.end()) {
        return invalid("release: memory " + std::to_string(id) +
                       " is not known to this driver: it was never created, or released before");
    }
    if (found->second.mappings != 0) {
        return invalid("release: memory " + std::to_string(id) + " of " + human_bytes(found->second.bytes) +
                       " is mapped " + std::to_string(found->second.mappings) + " times; unmap it first");
    }
    const Memory memory = found->second;
    memory_.erase(found);
    --stats_.physicals;
    stats_.created_bytes -= memory.bytes;
    return memory;
}

Status Book::put_back(PhysicalId id, const Memory &memory) {
    return no_throw([&]() -> Status {
        std::lock_guard guard(mutex_);
        memory_.emplace(id, memory);
        ++stats_.physicals;
        stats_.created_bytes += memory.bytes;
        return {};
    });
}

Result<std::uint64_t> Book::begin_map(Address address, std::uint64_t bytes, PhysicalId id) {
    return no_throw([&]() -> Result<std::uint64_t> {
        std::lock_guard guard(mutex_);
        if (Status status = check_range("map", address, bytes); !status.ok()) return status;
        auto found = memory_.find(id);
        if (found == memory_.end()) {
            return invalid("map: memory " + std::to_string(id) +
                           " is not known to this driver: it was never created, or released before");
        }
        if (found->second.bytes != bytes) {
            return invalid("map: memory " + std::to_string(id) + " has " + human_bytes(found->second.bytes) +
                           " but the range has " + human_bytes(bytes) + "; memory is mapped whole");
        }
        if (Status status = check_free(address, bytes); !status.ok()) return invalid("map: " + status.message());
        mappings_.emplace(address, Mapping{bytes, id, true});
        ++found->second.mappings;
        ++stats_.mappings;
        stats_.mapped_bytes += bytes;
        return found->second.key;
    });
}

void Book::drop_mapping(Mappings::iterator mapping) {
    --stats_.mappings;
    stats_.mapped_bytes -= mapping->second.bytes;
    auto memory = memory_.find(mapping->second.id);
    if (memory != memory_.end()) --memory->second.mappings;
    mappings_.erase(mapping);
}

void Book::end_map(Address address, bool mapped) {
    std::lock_guard guard(mutex_);
    auto found = mappings_.find(address);
    if (found == mappings_.end()) return;  // forgotten by a fork in between
    if (mapped) {
        found->second.busy = false;
    } else {
        drop_mapping(found);
    }
}

Status Book::begin_access(Address address, std::uint64_t bytes, bool *fresh) {
    std::lock_guard guard(mutex_);
    if (Status status = check_range("set_access", address, bytes); !status.ok()) return status;
    *fresh = false;
    const auto first = mappings_.find(address);
    auto last = first;
    std::uint64_t covered = 0;
    for (; last != mappings_.end() && covered < bytes && last->first == address + covered; ++last) {
        if (last->second.busy) break;
        covered += last->second.bytes;
    }
    if (covered != bytes) {
        return invalid(
            "set_access: the range " + range_text(address, bytes) +
            " is not made of whole mappings at rest; map() it first, and do not change it from two threads at once");
    }
    for (auto it = first; it != last; ++it) {
        it->second.busy = true;
        if (!memory_.at(it->second.id).cleared) *fresh = true;
    }
    return {};
}

void Book::end_access(Address address, std::uint64_t bytes, bool cleared) {
    std::lock_guard guard(mutex_);
    for (auto it = mappings_.lower_bound(address); it != mappings_.end() && it->first - address < bytes; ++it) {
        it->second.busy = false;
        auto memory = memory_.find(it->second.id);
        if (cleared && memory != memory_.end()) memory->second.cleared = true;
    }
}

Status Book::begin_unmap(Address address, std::uint64_t bytes) {
    std::lock_guard guard(mutex_);
    if (Status status = check_range("unmap", address, bytes); !status.ok()) return status;
    auto found = mappings_.find(address);
    if (found == mappings_.end() || found->second.bytes != bytes) {
        return invalid("unmap: " + range_text(address, bytes) +
                       " is not what one map() call made; give the address and size that map() had");
    }
    if (found->second.busy) {
        return invalid("unmap: " + range_text(address, bytes) + " is being changed by another thread");
    }
    found->second.busy = true;
    return {};
}

void Book::end_unmap(Address address, bool unmapped) {
    std::lock_guard guard(mutex_);
    auto found = mappings_.find(address);
    if (found == mappings_.end()) return;  // forgotten by a fork in between
    if (unmapped) {
        drop_mapping(found);
    } else {
        found->second.busy = false;
    }
}

Book::Remains Book::remains() const {
    std::lock_guard guard(mutex_);
    Remains remains;
    for (const auto &[address, mapping] : mappings_) remains.mappings.emplace_back(address, mapping.bytes);
    for (const auto &[address, bytes] : reservations_) remains.reservations.emplace_back(address, bytes);
    for (const auto &[id, memory] : memory_) remains.keys.push_back(memory.key);
    return remains;
}

DriverStats Book::stats() const {
    std::lock_guard guard(mutex_);
    return stats_;
}

std::uint64_t Book::created_bytes() const {
    std::lock_guard guard(mutex_);
    return stats_.created_bytes;
}

std::uint64_t Book::forget() {
    const std::uint64_t mappings = stats_.mappings;
    reservations_.clear();
    mappings_.clear();
    memory_.clear();
    stats_ = {};
    return mappings;
}

}  // namespace elastickv
