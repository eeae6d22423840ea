// Kernels with AVX-512 F, BW, DQ and VL.
#include "simd_avx512.h"

namespace kfade::cpu {

extern const Kernels avx512_kernels;
const Kernels avx512_kernels{"avx512", Avx512::lanes, products_of_floats<Avx512>(), {}};

}  // namespace kfade::cpu
