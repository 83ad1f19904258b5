// Least-recently-used order of small integers, in one list or several: doubly linked in two arrays; every operation is
// O(1).
#pragma once

#include <cstdint>
#include <vector>

namespace elastickv {

class Lru {
  public:
    static constexpr std::uint32_t npos = ~std::uint32_t{0};

    explicit Lru(std::uint32_t size = 0, std::uint32_t lists = 1)
        : next_(size + lists, npos), previous_(size + lists, npos), ends_(size) {
        for (std::uint32_t end = ends_; end < ends_ + lists; ++end) next_[end] = previous_[end] = end;
    }

    std::uint32_t count() const noexcept { return count_; }
    std::uint32_t oldest(std::uint32_t list = 0) const noexcept { return after(ends_ + list); }
    std::uint32_t after(std::uint32_t id) const noexcept { return next_[id] >= ends_ ? npos : next_[id]; }
    bool contains(std::uint32_t id) const noexcept { return next_[id] != npos; }

    void push_newest(std::uint32_t id, std::uint32_t list = 0) noexcept { link(id, ends_ + list); }
    void push_oldest(std::uint32_t id, std::uint32_t list = 0) noexcept { link(id, next_[ends_ + list]); }

    void remove(std::uint32_t id) noexcept {
        next_[previous_[id]] = next_[id];
        previous_[next_[id]] = previous_[id];
        next_[id] = previous_[id] = npos;
        --count_;
    }

  private:
    void link(std::uint32_t id, std::uint32_t before) noexcept {
        const std::uint32_t last = previous_[before];
        next_[last] = id;
        previous_[id] = last;
        next_[id] = before;
        previous_[before] = id;
        ++count_;
    }

    std::vector<std::uint32_t> next_, previous_;
    std::uint32_t ends_;  // index of the first list's sentinel; those of the others follow
    std::uint32_t count_ = 0;
};

}  // namespace elastickv
