// Sixteen lanes.
#pragma once

#include <immintrin.h>

#include "micro.h"

namespace {

struct Avx512 {
  using Vector = __m512;
  using Cells = __m512;
  static constexpr int lanes = 16, rows_a_line = 1;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector fill(float x) { return _mm512_set1_ps(x); }
  static Vector load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(float* x, Vector v) { _mm512_storeu_ps(x, v); }
  static Vector multiply_add(Vector x, Vector y, Vector z) { return _mm512_fmadd_ps(x, y, z); }

  static __mmask16 part(std::int64_t count) { return count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1); }
  static Vector load_part(const float* x, __mmask16 part) { return _mm512_maskz_loadu_ps(part, x); }
  static void store_part(float* x, Vector v, __mmask16 part) { _mm512_mask_storeu_ps(x, part, v); }

  static Cells load_cells(const std::uint32_t* x) { return _mm512_load_ps(x); }
  static Cells broadcast(const std::uint32_t* x) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*x)));
  }
  static Vector dot(Vector sum, Cells x, Cells y) { return _mm512_fmadd_ps(x, y, sum); }

  static void pack(std::uint32_t* line, const float* x) { _mm512_store_ps(line, _mm512_loadu_ps(x)); }
  static void pack(std::uint32_t* line, const Brain* x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    _mm512_store_si512(line, _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void pack(std::uint32_t* line, const Half* x) {
    _mm512_store_ps(line, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
  }
};

}  // namespace
