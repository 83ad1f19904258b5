// Least-recently-used order of block ids: a doubly linked list in two arrays; every operation is O(1).
#pragma once

#include <cstdint>
#include <vector>

namespace elastickv {

class Lru {
  public:
    static constexpr std::uint32_t npos = ~std::uint32_t{0};

    explicit Lru(std::uint32_t size = 0) : next_(size + 1U, npos), previous_(size + 1U, npos), end_(size) {
        next_[end_] = previous_[end_] = end_;
    }

    std::uint32_t count() const noexcept { return count_; }
    std::uint32_t oldest() const noexcept { return next_[end_] == end_ ? npos : next_[end_]; }
    std::uint32_t after(std::uint32_t id) const noexcept { return next_[id] == end_ ? npos : next_[id]; }
    bool contains(std::uint32_t id) const noexcept { return next_[id] != npos; }

    void push_newest(std::uint32_t id) noexcept {
        const std::uint32_t last = previous_[end_];
        next_[last] = id;
        previous_[id] = last;
        next_[id] = end_;
        previous_[end_] = id;
        ++count_;
    }

    void remove(std::uint32_t id) noexcept {
        next_[previous_[id]] = next_[id];
        previous_[next_[id]] = previous_[id];
        next_[id] = previous_[id] = npos;
        --count_;
    }

  private:
    std::vector<std::uint32_t> next_, previous_;
    std::uint32_t end_;  // the sentinel's index
    std::uint32_t count_ = 0;
};

}  // namespace elastickv
