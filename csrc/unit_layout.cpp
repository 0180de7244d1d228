#include "unit_layout.hpp"

#include <utility>

#include "error.hpp"

namespace sidp {

std::uint64_t TensorLayout::split_length() const {
  switch (split) {
    case Split::rows:
      return rows / groups;
    case Split::cols:
      return cols / groups;
    case Split::none:
      break;
  }
  return 0;
}

std::uint64_t split_begin(std::uint64_t length, int part, int parts) {
  std::uint64_t quantum = 64;
  while (quantum > 1 && (length % quantum != 0 || length / quantum < static_cast<std::uint64_t>(parts))) quantum /= 2;
  return length / quantum * part / parts * quantum;
}

UnitLayout::UnitLayout(std::vector<TensorLayout> tensors) : tensors_(std::move(tensors)) {
  SIDP_REQUIRE(!tensors_.empty(), ConfigError, "a unit needs at least one tensor, got none");
  for (TensorLayout& tensor : tensors_) {
    SIDP_REQUIRE(tensor.bytes() > 0, ConfigError, "tensor '", tensor.name, "' is empty: shape [", tensor.rows, ", ",
                 tensor.cols, "] of ", tensor.element_bytes, "-byte elements");
    const std::uint64_t along = tensor.split == Split::cols ? tensor.cols : tensor.rows;
    SIDP_REQUIRE(tensor.groups >= 1 && along % tensor.groups == 0, ConfigError, "tensor '", tensor.name, "': ", along,
                 " does not divide into ", tensor.groups, " groups");
    tensor.offset = bytes_;
    bytes_ = align_up(bytes_ + tensor.bytes(), kTensorAlignment);
  }
}

std::vector<Piece> UnitLayout::whole() const {
  std::vector<Piece> pieces;
  pieces.reserve(tensors_.size());
  for (std::size_t t = 0; t < tensors_.size(); ++t)
    pieces.push_back({t, 0, tensors_[t].rows, 0, tensors_[t].cols, tensors_[t].offset});
  return pieces;
}

std::vector<Piece> UnitLayout::share(int part, int parts, int whole_tensors_to) const {
  std::vector<Piece> pieces;
  std::uint64_t offset = 0;
  for (std::size_t t = 0; t < tensors_.size(); ++t) {
    const TensorLayout& tensor = tensors_[t];
    offset = align_up(offset, kTensorAlignment);
    if (tensor.split == Split::none) {
      if (part == whole_tensors_to) pieces.push_back({t, 0, tensor.rows, 0, tensor.cols, offset});
      if (part == whole_tensors_to) offset += tensor.bytes();
      continue;
    }
    const std::uint64_t length = tensor.split_length();
    const std::uint64_t begin = split_begin(length, part, parts);
    const std::uint64_t count = split_begin(length, part + 1, parts) - begin;
    for (std::uint64_t group = 0; group < tensor.groups && count > 0; ++group) {
      Piece piece{t, 0, tensor.rows, 0, tensor.cols, offset};
      (tensor.split == Split::rows ? piece.row : piece.col) = group * length + begin;
      (tensor.split == Split::rows ? piece.rows : piece.cols) = count;
      pieces.push_back(piece);
      offset += piece.rows * piece.cols * tensor.element_bytes;
    }
  }
  return pieces;
}

std::uint64_t UnitLayout::extent_bytes(const std::vector<Piece>& pieces) const {
  if (pieces.empty()) return 0;
  const Piece& last = pieces.back();
  return align_up(last.offset + last.rows * last.cols * tensors_[last.tensor].element_bytes, kTensorAlignment);
}

}  // namespace sidp
