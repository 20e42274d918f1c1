// Stable sort of gates in falling order, by radix: about ten times as fast as a comparison sort for the lengths that
// occur here.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace m2mkd {

// Sorts indices 0 .. count-1 by falling value; equal values keep their order and NaN comes first, as in torch.sort.
// Values are gates: never negative, so that their bits, read as an integer, are ordered as they are.
template <typename scalar_t>
class FallingOrder {
 public:
  // Returns at least the first `limit` indices; valid until the next call. `value(i)` is the i-th value.
  template <typename Value>
  const std::vector<int32_t>& operator()(int64_t count, int64_t limit, const Value& value) {
    keys_.resize(count);
    index_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      keys_[i] = falling_key(value(i));
      index_[i] = static_cast<int32_t>(i);
    }
    if (2 * limit < count) {
      leave_out_small_values(limit);
    }
    sort();
    return index_;
  }

 private:
  using Key = std::conditional_t<sizeof(scalar_t) == 4, uint32_t, uint64_t>;
  static constexpr int kBits = 9;
  static constexpr Key kMask = (Key(1) << kBits) - 1;

  static Key falling_key(scalar_t value) {
    Key bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return std::isnan(value) ? 0 : ~bits;
  }

  // Keeps, in their order, those whose key has at most the upper bits of the key at position `limit`.
  void leave_out_small_values(int64_t limit) {
    constexpr int kUpper = 11, kShift = 8 * sizeof(Key) - kUpper;
    std::array<int32_t, 1 << kUpper> count{};
    for (const Key key : keys_) {
      ++count[key >> kShift];
    }
    Key last = 0;
    for (int64_t found = count[0]; found < limit; found += count[last]) {
      ++last;
    }
    size_t kept = 0;
    for (size_t i = 0; i < keys_.size(); ++i) {
      const Key key = keys_[i];
      keys_[kept] = key;
      index_[kept] = static_cast<int32_t>(i);
      kept += (key >> kShift) <= last;
    }
    keys_.resize(kept);
    index_.resize(kept);
  }

  void sort() {
    if (keys_.empty()) {
      return;
    }
    const auto [lowest, highest] = std::minmax_element(keys_.begin(), keys_.end());
    const Key first = *lowest, range = *highest - first;  // gates span few of the possible keys
    for (Key& key : keys_) {
      key -= first;
    }
    keys_out_.resize(keys_.size());
    index_out_.resize(keys_.size());
    for (int shift = 0; shift < static_cast<int>(8 * sizeof(Key)) && range >> shift != 0; shift += kBits) {
      pass(shift);
    }
  }

  void pass(int shift) {
    std::array<int32_t, kMask + 1> next{};
    for (const Key key : keys_) {
      ++next[(key >> shift) & kMask];
    }
    int32_t first = 0;
    for (int32_t& count : next) {
      first += std::exchange(count, first);
    }
    for (size_t i = 0; i < keys_.size(); ++i) {
      const int32_t to = next[(keys_[i] >> shift) & kMask]++;
      keys_out_[to] = keys_[i];
      index_out_[to] = index_[i];
    }
    keys_.swap(keys_out_);
    index_.swap(index_out_);
  }

  std::vector<Key> keys_, keys_out_;
  std::vector<int32_t> index_, index_out_;
};

}  // namespace m2mkd
