// What the kernels on states [batch, latents, width] with one scale per latent share: how work is cut into pieces, and
// how sums over pieces are taken. Both follow from the shape alone, so that results do not depend on the number of
// threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace m2mkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWorthAThread = 16384;  // elements

// total = parts[0] + parts[1] + ..., in this order.
template <typename scalar_t>
void sum_parts(const Tensor& parts, const Tensor& total) {
  const int64_t number = parts.size(0), size = total.numel();
  const scalar_t* part = parts.const_data_ptr<scalar_t>();
  scalar_t* sum = total.mutable_data_ptr<scalar_t>();
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, number));
  torch::stable::parallel_for(0, size, grain, [&](int64_t begin, int64_t end) {
    std::fill(sum + begin, sum + end, scalar_t(0));
    for (int64_t p = 0; p < number; ++p) {
      for (int64_t i = begin; i < end; ++i) {
        sum[i] += part[p * size + i];
      }
    }
  });
}

// A piece is a block of neighbouring latents in a chunk of the batch: its rows of one image lie side by side, and its
// scales stay in the first cache while it goes through the images.
struct LatentBlocks {
  int64_t batch, latents, width;
  int64_t blocks, chunks, images;  // blocks of latents, chunks of the batch, images of a chunk

  // Rows that share one scale (scale_rows is 1) are rows of one latent.
  LatentBlocks(int64_t batch_size, int64_t num_latents, int64_t size, int64_t scale_rows)
      : batch(scale_rows == 1 ? batch_size * num_latents : batch_size), latents(scale_rows), width(size) {
    constexpr int64_t kPieces = 64, kFewestImages = 32;
    blocks = (latents + kLatents - 1) / kLatents;
    const int64_t wanted = (kPieces + blocks - 1) / std::max<int64_t>(1, blocks);
    images = std::max((batch + wanted - 1) / wanted, std::min(batch, kFewestImages));
    chunks = batch == 0 ? 0 : (batch + images - 1) / images;
  }

  int64_t pieces() const {
    return blocks * chunks;
  }

  // Calls run(piece, chunk) for every piece, on all threads.
  template <typename Run>
  void in_parallel(const Run& run) const {
    const int64_t cost = std::max<int64_t>(1, kLatents * images * width);
    const int64_t grain = std::max<int64_t>(1, kWorthAThread / cost);
    torch::stable::parallel_for(0, pieces(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        run(piece, piece / blocks);
      }
    });
  }

  // Sets the rows of a piece's latents to zero, in sums [latents, width].
  template <typename scalar_t>
  void clear_rows(int64_t piece, scalar_t* sums) const {
    const int64_t first = piece % blocks * kLatents, last = std::min(latents, first + kLatents);
    std::fill(sums + first * width, sums + last * width, scalar_t(0));
  }

  // Where chunks leave their parts of these sums over the batch, [chunks, latents, width] each: one chunk, in the sums.
  std::vector<Tensor> parts_of(const std::vector<Tensor>& sums) const {
    std::vector<Tensor> parts;
    for (const Tensor& sum : sums) {
      parts.push_back(chunks == 1 ? sum : torch::stable::new_empty(sum, {chunks, latents, width}));
    }
    return parts;
  }

  template <typename scalar_t>
  void sum_parts_of(const std::vector<Tensor>& parts, const std::vector<Tensor>& sums) const {
    for (size_t i = 0; i < sums.size() && chunks != 1; ++i) {
      sum_parts<scalar_t>(parts[i], sums[i]);
    }
  }

  // Calls visit(latent, row) for the rows of a piece, image by image.
  template <typename Visit>
  void for_each_row(int64_t piece, const Visit& visit) const {
    const int64_t first = piece % blocks * kLatents, last = std::min(latents, first + kLatents);
    const int64_t chunk = piece / blocks, end = std::min(batch, (chunk + 1) * images);
    for (int64_t image = chunk * images; image < end; ++image) {
      for (int64_t latent = first; latent < last; ++latent) {
        visit(latent, image * latents + latent);
      }
    }
  }

 private:
  static constexpr int64_t kLatents = 8;
};

inline void check_precision(const Tensor& tensor, ScalarType expected, const char* name) {
  STD_TORCH_CHECK(expected == ScalarType::Float || expected == ScalarType::Double, "expected float32 or float64");
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, " must have the dtype of the other tensors");
}

}  // namespace m2mkd
