#include "memory/page_table.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstring>

#include "base/faultpoint.hpp"
#include "base/futex.hpp"

namespace elastickv {
namespace {

constexpr std::uint64_t kMagic = 0x31304250564b45ULL;  // "EKVPB01"
constexpr std::uint32_t kVersion = 3;
constexpr std::uint64_t kMaxPages = std::uint64_t{1} << 24;  // what a Wanted word can count
constexpr std::uint32_t kMaxRanks = 1024;

std::uint64_t aligned(std::uint64_t bytes) { return (bytes + 63U) & ~std::uint64_t{63}; }

std::uint64_t size_for(std::uint64_t pages, std::uint32_t ranks, std::uint64_t ring) {
    return aligned(sizeof(PageTableHeader)) + aligned(sizeof(RankSlot) * ranks) + aligned(8 * pages) * 2 +
           aligned(8 * pages * ranks) + aligned(4 * ring);
}

Status failed(const char *what, const std::string &where) {
    return {Code::driver, std::string(what) + " " + where + ": " + std::strerror(errno)};
}

}  // namespace

Result<std::shared_ptr<PageTable>> PageTable::create(std::uint64_t pages, std::uint32_t ranks,
                                                     std::uint64_t incarnation) {
    if (pages == 0 || pages >= kMaxPages || ranks == 0 || ranks > kMaxRanks)
        return Status(Code::invalid, "a page table of " + std::to_string(pages) + " pages for " +
                                         std::to_string(ranks) + " ranks: 1 to " + std::to_string(kMaxPages - 1) +
                                         " pages and 1 to " + std::to_string(kMaxRanks) +
                                         " ranks are possible; choose a larger page or a smaller virtual size");
    std::shared_ptr<PageTable> table(new PageTable);
    const std::uint64_t ring = std::bit_ceil(std::max<std::uint64_t>(1024, pages));
    table->bytes_ = size_for(pages, ranks, ring);
    table->owner_ = true;
    table->file_ = memfd_create("elastickv-pages", MFD_CLOEXEC);
    if (table->file_ < 0) return failed("memfd_create of", "the page table");
    errno = ENOSPC;
    if (fault::point("memory.table.create") || ftruncate(table->file_, static_cast<off_t>(table->bytes_)) != 0)
        return failed("ftruncate of", "the page table to " + std::to_string(table->bytes_) + " bytes");
    table->base_ = mmap(nullptr, table->bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, table->file_, 0);
    if (table->base_ == MAP_FAILED) {
        table->base_ = nullptr;
        return failed("mmap of", "the page table");
    }
    auto *header = static_cast<PageTableHeader *>(table->base_);
    header->version = kVersion;
    header->ranks = ranks;
    header->pages = pages;
    header->ring_size = ring;
    header->incarnation = incarnation;
    header->magic = kMagic;
    table->lay_out();
    return table;
}

Result<std::shared_ptr<PageTable>> PageTable::open(const std::string &path, std::uint64_t incarnation) {
    std::shared_ptr<PageTable> table(new PageTable);
    errno = ENOENT;
    if (!fault::point("memory.table.open")) table->file_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (table->file_ < 0) return failed("opening the scheduler's page table", path);
    struct stat info{};
    if (fstat(table->file_, &info) != 0) return failed("fstat of the page table", path);
    table->bytes_ = static_cast<std::uint64_t>(info.st_size);
    if (table->bytes_ < sizeof(PageTableHeader))
        return Status(Code::corrupt, path + " is no page table: it holds " + std::to_string(table->bytes_) + " bytes");
    table->base_ = mmap(nullptr, table->bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, table->file_, 0);
    if (table->base_ == MAP_FAILED) {
        table->base_ = nullptr;
        return failed("mmap of the page table", path);
    }
    const auto *header = static_cast<const PageTableHeader *>(table->base_);
    if (header->magic != kMagic || header->version != kVersion || header->incarnation != incarnation ||
        header->pages == 0 || header->pages >= kMaxPages || header->ranks == 0 || header->ranks > kMaxRanks ||
        !std::has_single_bit(header->ring_size) ||
        size_for(header->pages, header->ranks, header->ring_size) != table->bytes_)
        return Status(Code::corrupt, path + " is no page table of this tenant and version (version " +
                                         std::to_string(header->version) + ", incarnation " +
                                         std::to_string(header->incarnation) + ", wanted " + std::to_string(kVersion) +
                                         " and " + std::to_string(incarnation) +
                                         "): start the engine and its workers from one installation");
    table->lay_out();
    return table;
}

void PageTable::lay_out() noexcept {
    auto *cursor = static_cast<std::byte *>(base_);
    header_ = reinterpret_cast<PageTableHeader *>(cursor);
    const std::uint64_t pages = header_->pages, ranks = header_->ranks;
    cursor += aligned(sizeof(PageTableHeader));
    rank_slots_ = reinterpret_cast<RankSlot *>(cursor);
    cursor += aligned(sizeof(RankSlot) * ranks);
    wanted_ = reinterpret_cast<std::atomic<std::uint64_t> *>(cursor);
    cursor += aligned(8 * pages);
    tickets_ = reinterpret_cast<std::atomic<std::uint64_t> *>(cursor);
    cursor += aligned(8 * pages);
    so_ = reinterpret_cast<std::atomic<std::uint64_t> *>(cursor);
    cursor += aligned(8 * pages * ranks);
    ring_ = reinterpret_cast<std::atomic<std::uint32_t> *>(cursor);
}

PageTable::~PageTable() {
    if (header_ != nullptr && owner_ && !origin_.elsewhere()) {
        header_->closed.store(1, std::memory_order_release);
        ring_ranks();
    }
    if (base_ != nullptr) munmap(base_, bytes_);
    if (file_ >= 0) close(file_);
}

std::string PageTable::path() const { return "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(file_); }

void PageTable::order(std::uint64_t page, const Wanted &wanted, std::uint64_t ticket) noexcept {
    if (origin_.elsewhere()) return;
    tickets_[page].store(ticket, std::memory_order_relaxed);
    wanted_[page].store(wanted.pack(), std::memory_order_release);
    (void)fault::point("memory.order.written");
    const std::uint64_t tail = header_->ring_tail.load(std::memory_order_relaxed);
    ring_[tail & (header_->ring_size - 1)].store(static_cast<std::uint32_t>(page), std::memory_order_release);
    header_->ring_tail.store(tail + 1, std::memory_order_release);
    (void)fault::point("memory.order.placed");
}

void PageTable::ring_ranks() noexcept {
    if (!origin_.elsewhere()) futex_ring(header_->order_bell);
}

std::uint32_t PageTable::ring_at(std::uint64_t position) const noexcept {
    return ring_[position & (header_->ring_size - 1)].load(std::memory_order_acquire);
}

}  // namespace elastickv
