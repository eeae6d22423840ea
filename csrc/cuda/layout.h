// Where operands lie in shared memory and registers, and how they are described to the hardware. Host and device.
#pragma once

#include "schedule.h"

namespace kfade::cuda {

// Hopper: operands come in boxes of 64 columns × 64 summed rows of 16-bit elements. A row of a box is 128 bytes, its
// eight pieces of 16 bytes are exchanged by the row number (128-byte swizzle), and boxes begin on 1024 bytes.
constexpr int kBoxColumns = 64, kBoxDepth = 64, kBoxRowBytes = 128;
constexpr int kBoxBytes = kBoxDepth * kBoxRowBytes;
constexpr int kAtomRows = 8;          // rows after which the swizzle repeats
constexpr int kProductDepth = 16;     // summed rows of one wgmma of 16-bit elements

KFADE_HD uint32_t swizzle_128(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// A matrix descriptor of columns (the M or N dimension is contiguous) in boxes that follow each other, by the PTX ISA's
// "Matrix Descriptor Format": in units of 16 bytes the address, the leading offset (to the next 64 columns) and the
// stride offset (to the next 8 summed rows); in bits 62 and 63 the swizzle, 1 for 128 bytes.
KFADE_HD uint64_t descriptor(uint32_t address) {
  constexpr uint64_t leading = kBoxBytes / 16, stride = kAtomRows * kBoxRowBytes / 16, swizzle = 1;
  return (address & 0x3FFFF) >> 4 | leading << 16 | stride << 32 | swizzle << 62;
}

// What a descriptor grows by to the next 16 summed rows.
constexpr uint64_t kDescriptorStep = kProductDepth * kBoxRowBytes / 16;

// One stage: the boxes of the left operand, then those of the right one, of which each block of a pair loads half.
template <int Columns>
struct Stage {
  static constexpr int kLeftBoxes = kTileRows / kBoxColumns;
  static constexpr int kRightBoxes = Columns / kBoxColumns;
  static constexpr int kOwnBoxes = kRightBoxes / 2;
  static constexpr int kRight = kLeftBoxes * kBoxBytes;
  static constexpr int kBytes = kRight + kRightBoxes * kBoxBytes;
};

// Position in a ring of stages, and the parity of the round.
template <int Stages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  KFADE_HD void next() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Row (of 8, and 8 more) and first column (of 8) that a lane holds of a product of tensor cores; of m16n8k16 and,
// for each of the four warps that take 16 rows, of wgmma. Accumulator 4 j + 2 h + i is row + 8 h, column + 8 j + i.
KFADE_HD Place fragment(int lane) { return {lane / 4, 2 * (lane % 4)}; }

// Ampere: rows of 128 columns of 16-bit elements, 256 bytes; pieces of 16 bytes exchanged by the row number.
constexpr int kRowPieces = 16;
KFADE_HD uint32_t piece_offset(int row, int piece) {
  return static_cast<uint32_t>((row * kRowPieces + (piece ^ (row & 7))) * 16);
}

// Four neighbouring elements of float32 memory.
struct Four {
  float x, y, z, w;
};

}  // namespace kfade::cuda
