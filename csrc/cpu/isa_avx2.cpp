// Kernels with AVX2, FMA and F16C: eight lanes.
#include <immintrin.h>

#include "micro.h"

namespace {

struct Avx2 {
  using Vector = __m256;
  using Cells = __m256;
  static constexpr int lanes = 8, rows_a_line = 1;

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector fill(float x) { return _mm256_set1_ps(x); }
  static Vector load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(float* x, Vector v) { _mm256_storeu_ps(x, v); }
  static Vector multiply_add(Vector x, Vector y, Vector z) { return _mm256_fmadd_ps(x, y, z); }

  static __m256i part(std::int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count < 0 ? 0 : static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vector load_part(const float* x, __m256i part) { return _mm256_maskload_ps(x, part); }
  static void store_part(float* x, Vector v, __m256i part) { _mm256_maskstore_ps(x, part, v); }

  static Cells load_cells(const std::uint32_t* x) {
    return _mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static Cells broadcast(const std::uint32_t* x) {
    return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(*x)));
  }
  static Vector dot(Vector sum, Cells x, Cells y) { return _mm256_fmadd_ps(x, y, sum); }

  static void keep(std::uint32_t* line, Vector v) { _mm256_store_si256(reinterpret_cast<__m256i*>(line), _mm256_castps_si256(v)); }
  static void pack(std::uint32_t* line, const float* x) { keep(line, _mm256_loadu_ps(x)); }
  static void pack(std::uint32_t* line, const Brain* x) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    keep(line, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
  }
  static void pack(std::uint32_t* line, const Half* x) {
    keep(line, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
  }
};

}  // namespace

namespace kfade::cpu {

extern const Kernels avx2_kernels;
const Kernels avx2_kernels{"avx2", Avx2::lanes, products_of_floats<Avx2>(), {}};

}  // namespace kfade::cpu
