// A set of small integers with O(log64 n) insert, erase, lowest and highest: three words a step for 16 million.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace elastickv {

class Bitmap {
  public:
    static constexpr std::uint64_t npos = ~std::uint64_t{0};

    explicit Bitmap(std::uint64_t size = 0) {
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(size, 0);
        } while (size > 1);
    }

    bool contains(std::uint64_t i) const noexcept { return (levels_[0][i >> 6] >> (i & 63)) & 1U; }
    std::uint64_t count() const noexcept { return count_; }

    // True when the set changed.
    bool insert(std::uint64_t i) noexcept {
        if (contains(i)) return false;
        ++count_;
        for (auto &level : levels_) {
            std::uint64_t &word = level[i >> 6];
            const bool was_empty = word == 0;
            word |= std::uint64_t{1} << (i & 63);
            if (!was_empty) break;
            i >>= 6;
        }
        return true;
    }

    bool erase(std::uint64_t i) noexcept {
        if (!contains(i)) return false;
        --count_;
        for (auto &level : levels_) {
            std::uint64_t &word = level[i >> 6];
            word &= ~(std::uint64_t{1} << (i & 63));
            if (word != 0) break;
            i >>= 6;
        }
        return true;
    }

    std::uint64_t first() const noexcept {
        if (count_ == 0) return npos;
        std::uint64_t i = 0;
        for (std::size_t level = levels_.size(); level-- > 0;)
            i = (i << 6) | static_cast<std::uint64_t>(std::countr_zero(levels_[level][i]));
        return i;
    }

    std::uint64_t last() const noexcept {
        if (count_ == 0) return npos;
        std::uint64_t i = 0;
        for (std::size_t level = levels_.size(); level-- > 0;)
            i = (i << 6) | static_cast<std::uint64_t>(63 - std::countl_zero(levels_[level][i]));
        return i;
    }

    // The lowest member ≥ i, or npos.
    std::uint64_t first_from(std::uint64_t i) const noexcept {
        for (std::size_t level = 0; level < levels_.size(); ++level) {
            const std::uint64_t index = i >> 6;
            if (index >= levels_[level].size()) return npos;
            const std::uint64_t word = levels_[level][index] >> (i & 63);
            if (word != 0) {
                i += static_cast<std::uint64_t>(std::countr_zero(word));
                while (level-- > 0) i = (i << 6) | static_cast<std::uint64_t>(std::countr_zero(levels_[level][i]));
                return i;
            }
            i = index + 1;
        }
        return npos;
    }

    // The highest member < i, or npos.
    std::uint64_t last_before(std::uint64_t i) const noexcept {
        for (std::size_t level = 0; level < levels_.size(); ++level) {
            if (i == 0) return npos;
            const std::uint64_t index = (i - 1) >> 6, bit = (i - 1) & 63;
            const std::uint64_t word = levels_[level][index] << (63 - bit);
            if (word != 0) {
                i = i - 1 - static_cast<std::uint64_t>(std::countl_zero(word));
                while (level-- > 0) i = (i << 6) | static_cast<std::uint64_t>(63 - std::countl_zero(levels_[level][i]));
                return i;
            }
            i = index;
        }
        return npos;
    }

  private:
    std::vector<std::vector<std::uint64_t>> levels_;  // [0] holds the members, [k+1] which words of [k] are not zero
    std::uint64_t count_ = 0;
};

}  // namespace elastickv
