// Streams and events of the CUDA driver: fences for the engine's work, and clearing of fresh memory. Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "base/status.hpp"
#include "driver/cuda_device.hpp"
#include "driver/driver.hpp"

namespace elastickv::cuda {

// A fence behind what is enqueued on `stream` now. The GPU's context must be current.
Result<std::unique_ptr<Fence>> record_fence(const std::shared_ptr<Gpu> &gpu, Stream stream);

// Fills ranges with zeros on a stream of its own, beside whatever the engine runs.
class Clearer {
  public:
    explicit Clearer(std::shared_ptr<Gpu> gpu) : gpu_(std::move(gpu)) {}
    ~Clearer();
    Clearer(const Clearer &) = delete;
    Clearer &operator=(const Clearer &) = delete;

    // Enqueues the fill; the fence is behind it. The GPU's context must be current.
    Result<std::unique_ptr<Fence>> start(DevicePointer address, std::uint64_t bytes);
    // Enqueues the fill and waits for it, `timeout_ms` at most. The GPU's context must be current. timeout: `*pending`
    // is the fence behind the fill that is still running; the range must stay mapped until it is done.
    Status clear(DevicePointer address, std::uint64_t bytes, std::uint64_t timeout_ms, std::unique_ptr<Fence> *pending);

  private:
    Result<Stream> stream();

    const std::shared_ptr<Gpu> gpu_;
    std::mutex mutex_;
    Stream stream_ = nullptr;
};

}  // namespace elastickv::cuda
