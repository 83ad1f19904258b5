#include "driver/cuda.hpp"

#include <bit>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "driver/book.hpp"
#include "driver/cuda_device.hpp"
#include "driver/cuda_stream.hpp"
#include "driver/cuda_table.hpp"
#include "driver/fork_guard.hpp"
#include "driver/handles.hpp"
#include "driver/text.hpp"

namespace elastickv {

namespace {

using cuda::ContextScope;
using cuda::Gpu;
using cuda::kSuccess;

cuda::AllocationProperties properties_of(int ordinal) {
    cuda::AllocationProperties properties{};
    properties.type = cuda::kAllocationPinned;
    properties.location = {cuda::kLocationDevice, ordinal};
    return properties;
}

// One fence with two owners: whoever waits for the clearing, and the driver, which must not unmap before.
class SharedFence final : public Fence {
  public:
    struct State {
        std::mutex mutex;
        std::unique_ptr<Fence> fence;  // null once it has passed
    };
    explicit SharedFence(std::shared_ptr<State> state) : state_(std::move(state)) {}

    Result<bool> done() noexcept override {
        return no_throw([&]() -> Result<bool> {
            std::lock_guard guard(state_->mutex);
            if (!state_->fence) return true;
            Result<bool> passed = state_->fence->done();
            if (passed.ok() && *passed) state_->fence.reset();
            return passed;
        });
    }

  private:
    const std::shared_ptr<State> state_;
};

class CudaDriver final : public Driver, public ForkAware {
  public:
    CudaDriver(std::shared_ptr<Gpu> gpu, std::uint64_t page_bytes, std::uint64_t clear_timeout_ms)
        : gpu_(std::move(gpu)),
          table_(gpu_->table()),
          page_bytes_(page_bytes),
          clear_timeout_ms_(clear_timeout_ms),
          book_(page_bytes),
          clearer_(gpu_) {
        watch_forks();
    }
    ~CudaDriver() override;

    std::string name() const override { return "cuda"; }
    std::string device_id() const override { return gpu_->id(); }
    std::uint64_t granularity() const noexcept override { return page_bytes_; }
    Result<Address> reserve(std::uint64_t bytes) noexcept override;
    Status free_address(Address address, std::uint64_t bytes) noexcept override;
    Result<PhysicalId> create(std::uint64_t bytes) noexcept override;
    Status release(PhysicalId id) noexcept override;
    Status map(Address address, std::uint64_t bytes, PhysicalId id) noexcept override;
    Status set_access(Address address, std::uint64_t bytes) noexcept override;
    Status open_access(Address address, std::uint64_t bytes, std::unique_ptr<Fence> *clearing) noexcept override;
    Status unmap(Address address, std::uint64_t bytes) noexcept override;
    Result<MemoryInfo> memory_info() noexcept override;
    DriverStats stats() const noexcept override { return book_.stats(); }
    Status bind_thread() noexcept override;
    Result<std::unique_ptr<Fence>> record(std::uint64_t stream) noexcept override;
    bool on_cpu() const noexcept override { return false; }
    int ordinal() const noexcept override { return gpu_->ordinal(); }

    void before_fork() noexcept override;
    void after_fork_in_parent() noexcept override;
    void after_fork_in_child() noexcept override;

  private:
    Status enter(const char *call) const;
    Status give_access(Address address, std::uint64_t bytes, std::unique_ptr<Fence> *clearing);
    Status allow_and_clear(Address address, std::uint64_t bytes, bool fresh, std::unique_ptr<Fence> *clearing);
    Status start_clearing(Address address, std::uint64_t bytes, std::unique_ptr<Fence> *clearing);
    Status check_cleared(Address address, std::uint64_t bytes);
    std::string text(const char *what, std::uint64_t bytes, Address address) const;

    const std::shared_ptr<Gpu> gpu_;
    const cuda::Table &table_;
    const std::uint64_t page_bytes_;
    const std::uint64_t clear_timeout_ms_;
    Book book_;
    cuda::Clearer clearer_;
    std::mutex clearing_mutex_;
    std::map<Address, std::unique_ptr<Fence>> clearing_;  // ranges whose clearing may still run
};

// Whatever was not given back goes now.
CudaDriver::~CudaDriver() {
    ignore_forks();
    const Status status = no_throw([&]() -> Status {
        const Book::Remains remains = book_.remains();
        if (gpu_->abandoned() || remains.empty()) return {};
        ContextScope scope(*gpu_);
        if (!scope.status().ok()) return scope.status();
        cuda::Code last = kSuccess;
        const auto note = [&](cuda::Code code) {
            last = code == kSuccess || code == cuda::kDeinitialized ? last : code;
        };
        for (const auto &[address, bytes] : remains.mappings) {
            if (check_cleared(address, bytes).ok()) note(table_.memory_unmap.insist(address, bytes));
        }
        for (const std::uint64_t key : remains.keys) note(table_.memory_release.insist(key));
        for (const auto &[address, bytes] : remains.reservations) note(table_.address_free.insist(address, bytes));
        return last == kSuccess ? Status() : table_.failure("closing the driver", last, "giving memory back");
    });
    detail::count_leak(status);
}

// A forked child has no CUDA: its calls that take are refused there, and those that give back have nothing to do.
Status CudaDriver::enter(const char *call) const {
    if (!gpu_->abandoned()) return {};
    return {Code::driver,
            std::string(call) +
                ": this process is a fork of the one that opened the driver, where CUDA does not work; start it "
                "with spawn instead of fork"};
}

std::string CudaDriver::text(const char *what, std::uint64_t bytes, Address address) const {
    return std::string(what) + " " + human_bytes(bytes) + " at " + hex(address) + " of " + gpu_->id();
}

Result<Address> CudaDriver::reserve(std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Result<Address> {
        if (Status status = enter("reserve"); !status.ok()) return status;
        if (Status status = book_.check_size("reserve", bytes); !status.ok()) return status;
        ContextScope scope(*gpu_);
        if (!scope.status().ok()) return scope.status();
        cuda::DevicePointer address = 0;
        if (cuda::Code code = table_.address_reserve(&address, bytes, page_bytes_, 0, 0); code != kSuccess) {
            return table_.failure(table_.address_reserve.name, code,
                                  "reserving " + human_bytes(bytes) + " of addresses for " + gpu_->id());
        }
        Status status = book_.add_reservation(address, bytes);
        if (status.ok()) return Address{address};
        if (cuda::Code code = table_.address_free(address, bytes); code != kSuccess) {
            return table_.failure(table_.address_free.name, code, "undoing a reservation");
        }
        return status;
    });
}

Status CudaDriver::free_address(Address address, std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Status {
        if (gpu_->abandoned()) return {};
        ContextScope scope(*gpu_);
        if (!scope.status().ok()) return scope.status();
        if (Status status = book_.take_reservation(address, bytes); !status.ok()) return status;
        const cuda::Code code = table_.address_free(address, bytes);
        if (code == kSuccess) return {};
        if (Status status = book_.add_reservation(address, bytes); !status.ok()) return status;
        return table_.failure(table_.address_free.name, code, text("freeing the addresses of", bytes, address));
    });
}

Result<PhysicalId> CudaDriver::create(std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Result<PhysicalId> {
        if (Status status = enter("create"); !status.ok()) return status;
        if (Status status = book_.check_size("create", bytes); !status.ok()) return status;
        ContextScope scope(*gpu_);
        if (!scope.status().ok()) return scope.status();
        const cuda::AllocationProperties properties = properties_of(gpu_->ordinal());
        cuda::Handle handle = 0;
        if (cuda::Code code = table_.memory_create(&handle, bytes, &properties, 0); code != kSuccess) {
            return table_.failure(table_.memory_create.name, code,
                                  "creating " + human_bytes(bytes) + " of memory on " + gpu_->id());
        }
        Result<PhysicalId> id = book_.add_memory(bytes, handle, false);
        if (id.ok()) return id;
        if (cuda::Code code = table_.memory_release(handle); code != kSuccess) {
            return table_.failure(table_.memory_release.name, code, "undoing the creation of memory");
        }
        return id;
    });
}

Status CudaDriver::release(PhysicalId id) noexcept {
    return no_throw([&]() -> Status {
        if (gpu_->abandoned()) return {};
        ContextScope scope(*gpu_);
        if (!scope.status().ok()) return scope.status();
        Result<Book::Memory> memory = book_.take_memory(id);
        if (!memory.ok()) return memory.status();
        const cuda::Code code = table_.memory_release(memory->key);
        if (code == kSuccess) return {};
        if (Status status = book_.put_back(id, *memory); !status.ok()) return status;
        return table_.failure(table_.memory_release.name, code,
                              "releasing " + human_bytes(memory->bytes) + " of memory on " + gpu_->id());
    });
}

Status CudaDriver::map(Address address, std::uint64_t bytes, PhysicalId id) noexcept {
    return no_throw([&]() -> Status {
        if (Status status = enter("map"); !status.ok()) return status;
        ContextScope scope(*gpu_);
        if (!scope.status().ok()) return scope.status();
        Result<std::uint64_t> handle = book_.begin_map(address, bytes, id);
        if (!handle.ok()) return handle.status();
        const cuda::Code code = table_.memory_map(address, bytes, 0, *handle, 0);
        book_.end_map(address, code == kSuccess);
        if (code == kSuccess) return {};
        return table_.failure(table_.memory_map.name, code, text("mapping", bytes, address));
    });
}

Status CudaDriver::start_clearing(Address address, std::uint64_t bytes, std::unique_ptr<Fence> *clearing) {
    Result<std::unique_ptr<Fence>> fence = clearer_.start(address, bytes);
    if (!fence.ok()) return fence.status();
    auto state = std::make_shared<SharedFence::State>();
    state->fence = std::move(fence).value();
    *clearing = std::make_unique<SharedFence>(state);
    auto own = std::make_unique<SharedFence>(std::move(state));
    std::lock_guard guard(clearing_mutex_);
    clearing_.insert_or_assign(address, std::move(own));
    return {};
}

// Waits for the clearing if `clearing` is null.
Status CudaDriver::allow_and_clear(Address address, std::uint64_t bytes, bool fresh, std::unique_ptr<Fence> *clearing) {
    const cuda::AccessDescription access{{cuda::kLocationDevice, gpu_->ordinal()}, cuda::kAccessReadWrite};
    if (cuda::Code code = table_.set_access(address, bytes, &access, 1); code != kSuccess) {
        return table_.failure(table_.set_access.name, code, text("giving access to", bytes, address));
    }
    if (!fresh) return {};
    if (clearing != nullptr) return start_clearing(address, bytes, clearing);
    std::unique_ptr<Fence> pending;
    Status status = clearer_.clear(address, bytes, clear_timeout_ms_, &pending);
    if (pending) {
        std::lock_guard guard(clearing_mutex_);
        clearing_.insert_or_assign(address, std::move(pending));
    }
    return status;
}

Status CudaDriver::give_access(Address address, std::uint64_t bytes, std::unique_ptr<Fence> *clearing) {
    if (Status status = enter("set_access"); !status.ok()) return status;
    ContextScope scope(*gpu_);
    if (!scope.status().ok()) return scope.status();
    bool fresh = false;
    if (Status status = book_.begin_access(address, bytes, &fresh); !status.ok()) return status;
    Status status = allow_and_clear(address, bytes, fresh, clearing);
    book_.end_access(address, bytes, status.ok());
    return status;
}

Status CudaDriver::set_access(Address address, std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Status { return give_access(address, bytes, nullptr); });
}

Status CudaDriver::open_access(Address address, std::uint64_t bytes, std::unique_ptr<Fence> *clearing) noexcept {
    clearing->reset();
    return no_throw([&]() -> Status { return give_access(address, bytes, clearing); });
}

// timeout while an earlier clearing of a part of the range may still be running.
Status CudaDriver::check_cleared(Address address, std::uint64_t bytes) {
    std::lock_guard guard(clearing_mutex_);
    auto it = clearing_.lower_bound(address);
    while (it != clearing_.end() && it->first - address < bytes) {
        Result<bool> done = it->second->done();
        if (!done.ok()) return done.status();
        if (!*done)
            return {Code::timeout,
                    text("unmapping", bytes, address) + ": clearing it has not ended yet; try again later"};
        it = clearing_.erase(it);
    }
    return {};
}

Status CudaDriver::unmap(Address address, std::uint64_t bytes) noexcept {
    return no_throw([&]() -> Status {
        if (gpu_->abandoned()) return {};
        ContextScope scope(*gpu_);
        if (!scope.status().ok()) return scope.status();
        if (Status status = book_.begin_unmap(address, bytes); !status.ok()) return status;
        Status status = check_cleared(address, bytes);
        if (status.ok()) {
            const cuda::Code code = table_.memory_unmap(address, bytes);
            if (code != kSuccess)
                status = table_.failure(table_.memory_unmap.name, code, text("unmapping", bytes, address));
        }
        book_.end_unmap(address, status.ok());
        return status;
    });
}

Result<MemoryInfo> CudaDriver::memory_info() noexcept {
    return no_throw([&]() -> Result<MemoryInfo> {
        if (Status status = enter("memory_info"); !status.ok()) return status;
        ContextScope scope(*gpu_);
        if (!scope.status().ok()) return scope.status();
        std::size_t free = 0;
        std::size_t total = 0;
        if (cuda::Code code = table_.memory_info(&free, &total); code != kSuccess) {
            return table_.failure(table_.memory_info.name, code, "asking for the free memory of " + gpu_->id());
        }
        return MemoryInfo{free, total};
    });
}

Status CudaDriver::bind_thread() noexcept {
    return no_throw([&]() -> Status {
        if (Status status = enter("bind_thread"); !status.ok()) return status;
        Result<cuda::Context> context = gpu_->context();
        if (!context.ok()) return context.status();
        const cuda::Code code = table_.context_set(*context);
        if (code == kSuccess) return {};
        return table_.failure(table_.context_set.name, code, "making the context of " + gpu_->id() + " current");
    });
}

Result<std::unique_ptr<Fence>> CudaDriver::record(std::uint64_t stream) noexcept {
    return no_throw([&]() -> Result<std::unique_ptr<Fence>> {
        if (Status status = enter("record"); !status.ok()) return status;
        ContextScope scope(*gpu_);
        if (!scope.status().ok()) return scope.status();
        return cuda::record_fence(gpu_, reinterpret_cast<cuda::Stream>(static_cast<std::uintptr_t>(stream)));
    });
}

void CudaDriver::before_fork() noexcept {
    book_.lock();
    clearing_mutex_.lock();
}

void CudaDriver::after_fork_in_parent() noexcept {
    clearing_mutex_.unlock();
    book_.unlock();
}

void CudaDriver::after_fork_in_child() noexcept {
    gpu_->abandon();
    book_.forget();
    after_fork_in_parent();
}

}  // namespace

Result<std::shared_ptr<Driver>> make_cuda_driver(const CudaOptions &options) {
    return no_throw([&]() -> Result<std::shared_ptr<Driver>> {
        Result<std::shared_ptr<Gpu>> opened = Gpu::open(options.device, options.library, options.allow_context);
        if (!opened.ok()) return opened.status();
        const std::shared_ptr<Gpu> gpu = std::move(opened).value();
        const cuda::Table &table = gpu->table();
        const cuda::AllocationProperties properties = properties_of(gpu->ordinal());
        std::size_t granularity = 0;
        if (cuda::Code code = table.granularity(&granularity, &properties, cuda::kGranularityMinimum);
            code != kSuccess) {
            return table.failure(table.granularity.name, code, "asking for the page size of " + gpu->id());
        }
        const std::uint64_t page = options.page_bytes == 0 ? granularity : options.page_bytes;
        if (granularity == 0 || page % granularity != 0 || !std::has_single_bit(page / granularity)) {
            return Status(Code::invalid, "page_bytes of " + human_bytes(page) + " is not the page of " + gpu->id() +
                                             ", " + human_bytes(granularity) + ", times a power of two");
        }
        return std::shared_ptr<Driver>(std::make_shared<CudaDriver>(gpu, page, options.clear_timeout_ms));
    });
}

}  // namespace elastickv
