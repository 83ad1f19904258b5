// One GPU of this process and its primary context, as the CUDA driver needs them. Thread-safe.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>

#include "base/status.hpp"
#include "driver/cuda_table.hpp"

namespace elastickv::cuda {

// "GPU-01234567-89ab-cdef-0123-456789abcdef", or "MIG-…".
std::string uuid_text(const Uuid &uuid, bool instance);

class Gpu {
  public:
    // `device`: "GPU-<uuid>", "MIG-<uuid>", or an ordinal as text, in the order that CUDA gives this process.
    static Result<std::shared_ptr<Gpu>> open(const std::string &device, const std::string &library, bool allow_context);
    ~Gpu();
    Gpu(const Gpu &) = delete;
    Gpu &operator=(const Gpu &) = delete;

    const Table &table() const noexcept { return table_; }
    int ordinal() const noexcept { return ordinal_; }
    const std::string &id() const noexcept { return id_; }

    // The primary context, retained at the first call. Fails, and says what to do, if nothing in this process has made
    // it active yet and the driver was not allowed to: a context costs hundreds of MiB of the GPU's memory.
    Result<Context> context();
    // In a forked child CUDA does not work; nothing is called there any more.
    void abandon() noexcept { abandoned_ = true; }
    bool abandoned() const noexcept { return abandoned_; }

  private:
    Gpu(Table table, bool allow_context) : table_(table), allow_context_(allow_context) {}
    Status find(const std::string &device);

    const Table table_;
    const bool allow_context_;
    Device device_ = 0;
    int ordinal_ = 0;
    std::string id_;
    std::mutex mutex_;
    std::atomic<Context> context_{nullptr};
    std::atomic<bool> abandoned_{false};
};

// Makes a GPU's context current for a scope and puts back what was current before. Costs one query where it is current
// already, as after bind_thread().
class ContextScope {
  public:
    explicit ContextScope(Gpu &gpu);
    ~ContextScope();
    ContextScope(const ContextScope &) = delete;
    ContextScope &operator=(const ContextScope &) = delete;
    const Status &status() const noexcept { return status_; }

  private:
    const Table &table_;
    Context before_ = nullptr;
    bool changed_ = false;
    Status status_;
};

}  // namespace elastickv::cuda
