// Where the tensors of one unit (a layer's FFN weights) lie: in a slot, and in each owner's share. Pure arithmetic.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sidp {

// Tensors start at multiples of this in slots and in extents; bulk copies and tensor maps need 128.
constexpr std::uint64_t kTensorAlignment = 256;

constexpr std::uint64_t align_up(std::uint64_t value, std::uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

// Which dimension of a tensor is the FFN's intermediate dimension, along which `striped` placement cuts.
enum class Split { none, rows, cols };

// One row-major matrix [rows, cols]; a vector is [n, 1]. `groups` counts blocks that are concatenated along the
// split dimension and cut each by itself (2 for a fused gate_up).
struct TensorLayout {
  std::string name;
  std::uint64_t rows = 0;
  std::uint64_t cols = 1;
  std::uint64_t element_bytes = 2;
  Split split = Split::none;
  std::uint64_t groups = 1;
  std::uint64_t offset = 0;  // in the unit; set by UnitLayout

  std::uint64_t bytes() const { return rows * cols * element_bytes; }
  // Length of the dimension that is cut, per group; 0 where nothing is.
  std::uint64_t split_length() const;
};

// A rectangle of one tensor, stored compactly (row pitch = cols * element_bytes) at `offset` of an extent.
struct Piece {
  std::size_t tensor = 0;
  std::uint64_t row = 0;
  std::uint64_t rows = 0;
  std::uint64_t col = 0;
  std::uint64_t cols = 0;
  std::uint64_t offset = 0;
};

class UnitLayout {
 public:
  explicit UnitLayout(std::vector<TensorLayout> tensors);

  const std::vector<TensorLayout>& tensors() const { return tensors_; }
  const TensorLayout& tensor(std::size_t index) const { return tensors_.at(index); }
  std::uint64_t bytes() const { return bytes_; }

  // The whole unit as one share: a piece a tensor, at the tensor's own offset.
  std::vector<Piece> whole() const;

  // Share `part` of `parts`. Tensors that are not split go to the part `whole_tensors_to`.
  std::vector<Piece> share(int part, int parts, int whole_tensors_to) const;

  // Bytes an extent needs for `pieces`, the tail padded to the tensor alignment.
  std::uint64_t extent_bytes(const std::vector<Piece>& pieces) const;

 private:
  std::vector<TensorLayout> tensors_;
  std::uint64_t bytes_ = 0;
};

// First index of share `part` when `length` is cut into `parts`. Cuts fall on multiples of the largest power of two up
// to 64 that divides `length` and still gives every part something, so that shares suit 64-wide matrix tiles.
std::uint64_t split_begin(std::uint64_t length, int part, int parts);

}  // namespace sidp
