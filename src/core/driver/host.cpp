#include "driver/host.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <string>

#include "driver/book.hpp"
#include "driver/fork_guard.hpp"
#include "driver/handles.hpp"
#include "driver/host_file.hpp"
#include "driver/host_memory.hpp"
#include "driver/text.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace elastickv {

namespace {

constexpr std::uint64_t kHugeBytes = std::uint64_t{2} << 20;
constexpr std::uint64_t kPageMultiple = 4096;

class PassedFence final : public Fence {
  public:
    Result<bool> done() noexcept override { return true; }
};

void *pointer(Address address) { return reinterpret_cast<void *>(static_cast<std::uintptr_t>(address)); }

Status forked(const char *call) {
    return {Code::driver, std::string(call) +
                              ": this process is a fork of the one that opened the driver, and owns nothing of it; "
                              "open a driver of its own"};
}

// What a failed mmap or mprotect means: the only ordinary cause is the number of mappings.
Status map_failure(const char *call, Address address, std::uint64_t bytes, int error) {
    const std::string text =
        std::string(call) + ": " + human_bytes(bytes) + " at " + hex(address) + " failed: " + errno_text(error);
    if (error != ENOMEM) return {Code::driver, text};
    return {Code::out_of_memory, text + "; raise vm.max_map_count, or use larger pages (page_bytes)"};
}

// Puts bare addresses over whatever is in the range, in one step: at no moment could another mapping of the process
// slip in. Returns an errno, 0 when done. That a child might inherit bare addresses costs nothing, so DONTFORK may fail
// there.
int cover(Address address, std::uint64_t bytes) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    void *at = ::mmap(pointer(address), bytes, PROT_NONE, kFlags, -1, 0);
    if (at == MAP_FAILED) return errno;
    ::madvise(at, bytes, MADV_DONTFORK);
    return 0;
}

// Ranges that the host drivers of this process have mapped, or are about to.
std::atomic<std::uint64_t> mapped_ranges{0};

// Counts one range more, or says why not.
Status count_range(std::uint64_t limit) {
    if (mapped_ranges.fetch_add(1) < limit) return {};
    mapped_ranges.fetch_sub(1);
    return {Code::out_of_memory, "map: this process has " + std::to_string(limit) +
                                     " ranges mapped, all that fit under the kernel's vm.max_map_count; raise that, or "
                                     "use larger pages (page_bytes)"};
}

class HostDriver final : public Driver, public ForkAware {
  public:
    explicit HostDriver(const HostOptions &options)
        : page_bytes_(options.page_bytes), total_bytes_(options.total_bytes), book_(options.page_bytes) {}
    ~HostDriver() override;
    Status open();

    std::string name() const override { return "host"; }
    std::string device_id() const override { return "host"; }
    std::uint64_t granularity() const noexcept override { return page_bytes_; }
    Result<Address> reserve(std::uint64_t bytes) noexcept override;
    Status free_address(Address address, std::uint64_t bytes) noexcept override;
    Result<PhysicalId> create(std::uint64_t bytes) noexcept override;
    Status release(PhysicalId id) noexcept override;
    Status map(Address address, std::uint64_t bytes, PhysicalId id) noexcept override;
    Status set_access(Address address, std::uint64_t bytes) noexcept override;
    Status unmap(Address address, std::uint64_t bytes) noexcept override;
    Result<MemoryInfo> memory_info() noexcept override;
    DriverStats stats() const noexcept override { return book_.stats(); }
    Result<std::unique_ptr<Fence>> record(std::uint64_t stream) noexcept override;
    bool on_cpu() const noexcept override { return true; }

    void before_fork() noexcept override;
    void after_fork_in_parent() noexcept override;
    void after_fork_in_child() noexcept override;

  private:
    Status check_budget(std::uint64_t bytes);

    const std::uint64_t page_bytes_;
    const std::uint64_t total_bytes_;
    const std::uint64_t ranges_limit_ = mapped_ranges_limit();
    Book book_;
    HostFile file_;
    std::mutex fork_mutex_;  // a mapping of the file must not be forked before it is marked MADV_DONTFORK
    std::atomic<std::uint64_t> created_{0};  // taken before the memory is, so that two calls cannot both fit
    std::atomic<bool> forked_{false};
};

// Whatever was not given back goes now; the memory itself goes with the file once nothing maps it.
HostDriver::~HostDriver() {
    ignore_forks();
    mapped_ranges.fetch_sub(book_.stats().mappings);
    const Status status = no_throw([&]() -> Status {
        for (const auto &[address, bytes] : book_.remains().reservations) {
            if (::munmap(pointer(address), bytes) != 0) return map_failure("closing", address, bytes, errno);
        }
        return {};
    });
    detail::count_leak(status);
}

Status HostDriver::open() {
    Status status = file_.open(page_bytes_ % kHugeBytes == 0 && huge_memory_files());
    if (status.ok()) watch_forks();
    return status;
}

Result<Address> HostDriver::reserve(std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Result<Address> {
        if (forked_) return forked("reserve");
        if (Status status = book_.check_size("reserve", bytes); !status.ok()) return status;
        const std::uint64_t align = std::max(page_bytes_, bytes >= kHugeBytes ? kHugeBytes : page_bytes_);
        // A page that is no multiple of 2 MiB but larger than it cannot have both; the page decides.
        const std::uint64_t step = align % page_bytes_ == 0 ? align : page_bytes_;
        const std::uint64_t length = bytes + step;
        void *raw = length < bytes
                        ? MAP_FAILED
                        : ::mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (raw == MAP_FAILED) {
            return Status(Code::out_of_memory, "reserve: " + human_bytes(bytes) + " of addresses failed: " +
                                                   errno_text(length < bytes ? EOVERFLOW : errno) +
                                                   "; reserve less, or raise the address space limit (ulimit -v)");
        }
        const Address start = reinterpret_cast<std::uintptr_t>(raw);
        const Address address = (start + step - 1) / step * step;
        if (address > start) ::munmap(raw, address - start);
        if (address + bytes < start + length) ::munmap(pointer(address + bytes), start + length - address - bytes);
        ::madvise(pointer(address), bytes, MADV_DONTFORK);
        if (Status status = book_.add_reservation(address, bytes); !status.ok()) {
            ::munmap(pointer(address), bytes);
            return status;
        }
        return address;
    });
}

Status HostDriver::free_address(Address address, std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Status {
        if (forked_) return {};  // a forked child has nothing to give back
        if (Status status = book_.take_reservation(address, bytes); !status.ok()) return status;
        if (::munmap(pointer(address), bytes) == 0) return {};
        const int error = errno;
        if (Status status = book_.add_reservation(address, bytes); !status.ok()) return status;
        return map_failure("free_address", address, bytes, error);
    });
}

// Counts the bytes as created, or says why not. The caller takes them off again when the creation fails.
Status HostDriver::check_budget(std::uint64_t bytes) {
    std::uint64_t held = created_.load();
    do {
        if (bytes > total_bytes_ || held > total_bytes_ - bytes) {
            return {Code::out_of_memory, "create: " + human_bytes(bytes) + " of host memory do not fit: " +
                                             human_bytes(held) + " of this driver's " + human_bytes(total_bytes_) +
                                             " are created; release some, or open the driver with more total_bytes"};
        }
    } while (!created_.compare_exchange_weak(held, held + bytes));
    const std::uint64_t available = available_host_bytes(bytes);
    if (bytes <= available) return {};
    created_ -= bytes;
    return {Code::out_of_memory, "create: " + human_bytes(bytes) + " of host memory do not fit: the machine has " +
                                     human_bytes(available) + " available; free memory on it, or lower the budget"};
}

Result<PhysicalId> HostDriver::create(std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Result<PhysicalId> {
        if (forked_) return forked("create");
        if (Status status = book_.check_size("create", bytes); !status.ok()) return status;
        if (Status status = check_budget(bytes); !status.ok()) return status;
        Result<std::uint64_t> offset = file_.take(bytes);
        if (!offset.ok()) {
            created_ -= bytes;
            return offset.status();
        }
        Result<PhysicalId> id = book_.add_memory(bytes, *offset, true);
        if (!id.ok() && file_.give(*offset, bytes).ok())
            created_ -= bytes;  // else it stays counted, for it stays created
        return id;
    });
}

Status HostDriver::release(PhysicalId id) noexcept {
    return no_throw([&]() -> Status {
        if (forked_) return {};  // a forked child has nothing to give back
        Result<Book::Memory> memory = book_.take_memory(id);
        if (!memory.ok()) return memory.status();
        Status status = file_.give(memory->key, memory->bytes);
        if (status.ok()) {
            created_ -= memory->bytes;
            return status;
        }
        if (Status back = book_.put_back(id, *memory); !back.ok()) return back;
        return status;
    });
}

Status HostDriver::map(Address address, std::uint64_t bytes, PhysicalId id) noexcept {
    return no_throw([&]() -> Status {
        if (forked_) return forked("map");
        // Counted before the book knows it and until after it has forgotten it: a fork in between never counts too few.
        if (Status status = count_range(ranges_limit_); !status.ok()) return status;
        Result<std::uint64_t> offset = book_.begin_map(address, bytes, id);
        if (!offset.ok()) {
            mapped_ranges.fetch_sub(1);
            return offset.status();
        }
        // The kernel counts mappings before it takes the old one away, so a failure leaves the reservation in place.
        int error = 0;
        {
            std::lock_guard guard(fork_mutex_);
            void *at = ::mmap(pointer(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, file_.fd(),
                              static_cast<off_t>(*offset));
            if (at == MAP_FAILED || ::madvise(at, bytes, MADV_DONTFORK) != 0) error = errno;
            if (error != 0 && at != MAP_FAILED) error = cover(address, bytes) == 0 ? error : EFAULT;
        }
        book_.end_map(address, error == 0);
        if (error != 0) mapped_ranges.fetch_sub(1);
        return error == 0 ? Status() : map_failure("map", address, bytes, error);
    });
}

Status HostDriver::set_access(Address address, std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Status {
        if (forked_) return forked("set_access");
        bool fresh = false;
        if (Status status = book_.begin_access(address, bytes, &fresh); !status.ok()) return status;
        int error = 0;
        if (page_bytes_ % kHugeBytes == 0) ::madvise(pointer(address), bytes, MADV_HUGEPAGE);  // best effort
        if (::mprotect(pointer(address), bytes, PROT_READ | PROT_WRITE) != 0) error = errno;
        // Fills the page tables from the pages that create() allocated: no fault later, and smaps shows them now.
        // Older kernels do not know it, and fill them at the first access instead.
        if (error == 0) ::madvise(pointer(address), bytes, MADV_POPULATE_WRITE);
        book_.end_access(address, bytes, true);
        return error == 0 ? Status() : map_failure("set_access", address, bytes, error);
    });
}

Status HostDriver::unmap(Address address, std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Status {
        if (forked_) return {};  // a forked child has nothing to give back
        if (Status status = book_.begin_unmap(address, bytes); !status.ok()) return status;
        const int error = cover(address, bytes);
        book_.end_unmap(address, error == 0);
        if (error == 0) mapped_ranges.fetch_sub(1);
        return error == 0 ? Status() : map_failure("unmap", address, bytes, error);
    });
}

Result<MemoryInfo> HostDriver::memory_info() noexcept {
    return no_throw([&]() -> Result<MemoryInfo> {
        const std::uint64_t created = std::min(created_.load(), total_bytes_);
        return MemoryInfo{std::min(total_bytes_ - created, available_host_bytes(total_bytes_)), total_bytes_};
    });
}

Result<std::unique_ptr<Fence>> HostDriver::record(std::uint64_t) noexcept {
    return no_throw([]() -> Result<std::unique_ptr<Fence>> { return {std::make_unique<PassedFence>()}; });
}

void HostDriver::before_fork() noexcept {
    fork_mutex_.lock();
    book_.lock();
    file_.lock();
}

void HostDriver::after_fork_in_parent() noexcept {
    file_.unlock();
    book_.unlock();
    fork_mutex_.unlock();
}

void HostDriver::after_fork_in_child() noexcept {
    forked_ = true;
    file_.close_in_child();
    mapped_ranges.fetch_sub(book_.forget());
    after_fork_in_parent();
}

}  // namespace

Result<std::shared_ptr<Driver>> make_host_driver(const HostOptions &options) {
    return no_throw([&]() -> Result<std::shared_ptr<Driver>> {
        const auto system_page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
        const std::uint64_t multiple = std::max(kPageMultiple, system_page);
        if (options.page_bytes == 0 || options.page_bytes % multiple != 0) {
            return Status(Code::invalid, "page_bytes of " + std::to_string(options.page_bytes) +
                                             " for the host driver is not a positive multiple of " +
                                             std::to_string(multiple) + "; 65536 is the default");
        }
        HostOptions full = options;
        if (full.total_bytes == 0) full.total_bytes = physical_host_bytes();
        if (full.total_bytes < full.page_bytes) {
            return Status(Code::invalid, "total_bytes of " + human_bytes(full.total_bytes) +
                                             " for the host driver is less than one page, " +
                                             human_bytes(full.page_bytes));
        }
        auto driver = std::make_shared<HostDriver>(full);
        if (Status status = driver->open(); !status.ok()) return status;
        return std::shared_ptr<Driver>(std::move(driver));
    });
}

}  // namespace elastickv
