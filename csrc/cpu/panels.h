// Packed panels of a chunk of rows.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace kfade::cpu {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Cells on lines of 64 bytes, not initialised.
class Cells {
 public:
  explicit Cells(std::int64_t count)
      : cells_(static_cast<std::uint32_t*>(::operator new(count * sizeof(std::uint32_t), std::align_val_t{64}))) {}
  ~Cells() { ::operator delete(cells_, std::align_val_t{64}); }
  Cells(const Cells&) = delete;
  Cells& operator=(const Cells&) = delete;
  std::uint32_t* data() const { return cells_; }

 private:
  std::uint32_t* cells_;
};

// Rows of one matrix, or of one side of a product, as panels of at most `lines` lines.
class Panels {
 public:
  Panels(const Rows& rows, std::int64_t lanes, std::int64_t lines)
      : rows_(rows), lanes_(lanes), stride_(lines * lanes), panels_(ceil_div(rows.columns(), lanes)),
        cells_(panels_ * stride_) {}

  const std::uint32_t* data() const { return cells_.data(); }
  std::int64_t stride() const { return stride_; }

  // Pieces of work for `pack`: some panels beside each other, so that whole cache lines of a row are read at once.
  std::int64_t strips() const { return ceil_div(panels_, panels_a_strip()); }

  // Packs a strip of the rows with these numbers, from this line on.
  void pack(const Products& products, std::int64_t strip, const std::int64_t* numbers, std::int64_t count,
            std::int64_t line) const {
    const std::int64_t first = strip * panels_a_strip();
    const std::int64_t last = first + panels_a_strip() < panels_ ? first + panels_a_strip() : panels_;
    products.pack({&rows_, numbers, count, first * lanes_, last - first,
                   cells_.data() + first * stride_ + line * lanes_, stride_});
  }

 private:
  std::int64_t panels_a_strip() const { return 64 / lanes_; }

  Rows rows_;
  std::int64_t lanes_, stride_, panels_;
  Cells cells_;
};

}  // namespace kfade::cpu
