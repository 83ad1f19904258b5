#include "base/origin.hpp"

#include <pthread.h>

#include <atomic>

namespace elastickv {

namespace {
std::atomic<std::uint64_t> epoch{1};

void after_fork_in_child() noexcept { epoch.fetch_add(1, std::memory_order_relaxed); }
// Before main() or while the library is loaded, so that no fork can be missed.
const int installed = pthread_atfork(nullptr, nullptr, after_fork_in_child);
}  // namespace

std::uint64_t fork_epoch() noexcept { return epoch.load(std::memory_order_relaxed); }

}  // namespace elastickv
