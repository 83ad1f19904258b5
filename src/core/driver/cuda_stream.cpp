#include "driver/cuda_stream.hpp"

#include <chrono>
#include <string>
#include <thread>
#include <utility>

#include "driver/text.hpp"

namespace elastickv::cuda {

namespace {

using Clock = std::chrono::steady_clock;

class EventFence final : public Fence {
  public:
    EventFence(std::shared_ptr<Gpu> gpu, Event event, Stream stream)
        : gpu_(std::move(gpu)), event_(event), stream_(stream) {}
    ~EventFence() override {
        // An event that cannot be destroyed goes with its context.
        if (!gpu_->abandoned()) static_cast<void>(gpu_->table().event_destroy.insist(event_));
    }
    EventFence(const EventFence &) = delete;
    EventFence &operator=(const EventFence &) = delete;

    Status record() {
        const Table &table = gpu_->table();
        const Code code = table.event_record(event_, stream_);
        recorded_ = code == kSuccess;
        if (recorded_) return {};
        Status status = table.failure(
            table.event_record.name, code,
            "recording a fence on stream " + hex(reinterpret_cast<std::uintptr_t>(stream_)) + " of " + gpu_->id());
        if (code != kInvalidHandle) return status;
        return {elastickv::Code::invalid, status.message() + "; give a stream of this process and device"};
    }

    // Records first where that has failed: a later point of the stream is behind the same work, and more.
    Result<bool> done() noexcept override {
        return no_throw([&]() -> Result<bool> {
            if (!recorded_) {
                ContextScope scope(*gpu_);
                if (!scope.status().ok()) return scope.status();
                if (Status status = record(); !status.ok()) return status;
            }
            const Table &table = gpu_->table();
            const Code code = table.event_query(event_);
            if (code == kSuccess) return true;
            if (code == kNotReady) return false;
            return table.failure(table.event_query.name, code,
                                 "asking whether a fence on " + gpu_->id() + " has passed");
        });
    }

  private:
    const std::shared_ptr<Gpu> gpu_;
    const Event event_;
    const Stream stream_;
    bool recorded_ = false;
};

Result<std::unique_ptr<EventFence>> make_fence(const std::shared_ptr<Gpu> &gpu, Stream stream) {
    const Table &table = gpu->table();
    Event event = nullptr;
    if (Code code = table.event_create(&event, kEventDisableTiming); code != kSuccess) {
        return table.failure(table.event_create.name, code, "making a fence on " + gpu->id());
    }
    return std::make_unique<EventFence>(gpu, event, stream);
}

}  // namespace

Result<std::unique_ptr<Fence>> record_fence(const std::shared_ptr<Gpu> &gpu, Stream stream) {
    Result<std::unique_ptr<EventFence>> fence = make_fence(gpu, stream);
    if (!fence.ok()) return fence.status();
    if (Status status = (*fence)->record(); !status.ok()) return status;
    return std::unique_ptr<Fence>(std::move(fence).value());
}

Clearer::~Clearer() {
    // A stream that cannot be destroyed goes with its context.
    if (stream_ != nullptr && !gpu_->abandoned()) static_cast<void>(gpu_->table().stream_destroy.insist(stream_));
}

Result<Stream> Clearer::stream() {
    std::lock_guard guard(mutex_);
    if (stream_ != nullptr) return stream_;
    const Table &table = gpu_->table();
    Stream made = nullptr;
    if (Code code = table.stream_create(&made, kStreamNonBlocking); code != kSuccess) {
        return table.failure(table.stream_create.name, code, "making a stream on " + gpu_->id());
    }
    stream_ = made;
    return made;
}

Result<std::unique_ptr<Fence>> Clearer::start(DevicePointer address, std::uint64_t bytes) {
    Result<Stream> own = stream();
    if (!own.ok()) return own.status();
    // All that may fail for want of memory comes before the fill: once that runs, there must be a fence behind it.
    Result<std::unique_ptr<EventFence>> fence = make_fence(gpu_, *own);
    if (!fence.ok()) return fence.status();
    const Table &table = gpu_->table();
    if (Code code = table.fill_async(address, 0, bytes, *own); code != kSuccess) {
        return table.failure(table.fill_async.name, code,
                             "clearing " + human_bytes(bytes) + " at " + hex(address) + " of " + gpu_->id());
    }
    static_cast<void>((*fence)->record());  // done() repeats it and reports
    return std::unique_ptr<Fence>(std::move(fence).value());
}

Status Clearer::clear(DevicePointer address, std::uint64_t bytes, std::uint64_t timeout_ms,
                      std::unique_ptr<Fence> *pending) {
    const auto started = Clock::now();
    const auto deadline = started + std::chrono::milliseconds(timeout_ms);
    Result<std::unique_ptr<Fence>> fence = start(address, bytes);
    if (!fence.ok()) return fence.status();
    for (;;) {
        Result<bool> done = (*fence)->done();
        if (!done.ok()) {
            *pending = std::move(fence).value();  // the fill may still run
            return done.status();
        }
        if (*done) return {};
        const auto now = Clock::now();
        if (now >= deadline) break;
        // A fill takes microseconds; behind a long kernel it may take much longer, and then precision matters little.
        if (now - started < std::chrono::microseconds(200)) {
            std::this_thread::yield();
        } else {
            std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
    }
    *pending = std::move(fence).value();
    return {elastickv::Code::timeout, "clearing " + human_bytes(bytes) + " at " + hex(address) + " of " + gpu_->id() +
                                          " was not done after " + std::to_string(timeout_ms) +
                                          " ms; the GPU is busy or hangs (see nvidia-smi)"};
}

}  // namespace elastickv::cuda
