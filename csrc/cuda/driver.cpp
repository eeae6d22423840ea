// What comes from the driver: whether there is one, and tensor maps. The driver is looked up when it is needed, so that
// the module loads without one.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "layout.h"

namespace kfade::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encode_function() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
  if (error != cudaSuccess) throw std::runtime_error(std::string("tensor maps: ") + cudaGetErrorString(error));
  if (status != cudaDriverEntryPointSuccess || found == nullptr) {
    throw std::runtime_error("tensor maps: the driver is older than CUDA 12.0");
  }
  return reinterpret_cast<Encode>(found);
}

}  // namespace

const char* refusal() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  return count == 0 ? "there is no CUDA device" : "";
}

void encode_map(TensorMap& map, Type type, const void* at, int columns, int rows, int sequences, int64_t row_stride,
                int64_t sequence_stride) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) == alignof(CUtensorMap));
  static const Encode encode = encode_function();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(sequences)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * row_stride), static_cast<cuuint64_t>(2 * sequence_stride)};
  const cuuint32_t box[] = {kBoxColumns, kBoxDepth, 1}, steps[] = {1, 1, 1};
  const CUresult result = encode(
      reinterpret_cast<CUtensorMap*>(&map),
      type == Type::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
      const_cast<void*>(at), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("tensor maps: the driver refuses one with error " + std::to_string(result));
  }
}

}  // namespace kfade::cuda
