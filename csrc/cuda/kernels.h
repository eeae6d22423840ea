// The compiled kernels, as the host calls them. `stream` is a cudaStream_t; errors of CUDA are runtime errors.
#pragma once

#include "schedule.h"

namespace kfade::cuda {

enum class Kernel { hopper, ampere };
enum class Type { bf16, fp16 };

// What a compiled kernel is: the tile of one work item, and what it takes of a multiprocessor.
struct Facts {
  Shape shape;   // without a group
  int depth;     // summed rows of a step
  int stages, cluster, threads, shared;
  int programs;  // blocks that one multiprocessor has room for
};

// Column sums: threads of a block, columns of its sums, rows of one part.
constexpr int kSumThreads = 256, kSumColumns = 64, kSumRows = 2048;

Facts outer_facts(Kernel kernel);
Facts squares_facts(Kernel kernel);

void launch_outer(Kernel kernel, Type type, const Launch& launch, int blocks, void* stream);
void launch_squares(Kernel kernel, Type type, const Launch& launch, int blocks, void* stream);
void launch_ordered_sum(const Launch& launch, Shape shape, int tiles, void* stream);
void launch_column_sums(Type type, const Launch& launch, int add_blocks, void* stream);

// Why no CUDA function can run in this process, or an empty text.
const char* refusal();
// A tensor map of [sequences, rows, columns], with boxes of 64 × 64 and 128-byte swizzle; strides in elements.
void encode_map(TensorMap& map, Type type, const void* at, int columns, int rows, int sequences, int64_t row_stride,
                int64_t sequence_stride);

}  // namespace kfade::cuda
