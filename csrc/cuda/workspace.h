// Several arrays in one tensor of PyTorch's allocator. It may go out of scope once the kernels that use it are
// launched: what the allocator gives to others on the same stream, they write after these kernels.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace m2mkd {

class Workspace {
 public:
  template <typename T>
  struct Array {
    int64_t first_byte;
  };

  template <typename T>
  Array<T> reserve(int64_t count) {
    const Array<T> array{bytes_};
    bytes_ += (count * int64_t(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return array;
  }

  void allocate(const torch::stable::Tensor& like) {
    memory_ = torch::stable::new_empty(like, {bytes_}, torch::headeronly::ScalarType::Byte);
  }

  template <typename T>
  T* operator[](Array<T> array) const {
    return reinterpret_cast<T*>(memory_->mutable_data_ptr<uint8_t>() + array.first_byte);
  }

 private:
  static constexpr int64_t kAlignment = 256;
  int64_t bytes_ = 0;
  std::optional<torch::stable::Tensor> memory_;
};

}  // namespace m2mkd
