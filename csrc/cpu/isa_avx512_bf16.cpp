// Kernels with AVX-512 and its dot products of bfloat16 pairs, which are summed in float32.
#include "simd_avx512.h"

namespace {

struct Pairs : Avx512 {
  using Cells = __m512i;
  static constexpr int rows_a_line = 2;

  static Cells load_cells(const std::uint32_t* x) { return _mm512_load_si512(x); }
  static Cells broadcast(const std::uint32_t* x) { return _mm512_set1_epi32(static_cast<int>(*x)); }
  static Vector dot(Vector sum, Cells x, Cells y) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }

  // Two rows as one line: the first in the low halves. A last row without a second is paired with zeros.
  static void pack(std::uint32_t* line, const Brain* first, const Brain* second) {
    __m512i cells = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    if (second != nullptr) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
      cells = _mm512_or_si512(cells, _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    _mm512_store_si512(line, cells);
  }
};

void pack_pairs(const Strip& strip) { pack_elements<Pairs, Brain>(strip, Brain{0x3f80}); }

}  // namespace

namespace kfade::cpu {

extern const Kernels avx512_bf16_kernels;
const Kernels avx512_bf16_kernels{
    "avx512_bf16", Avx512::lanes, products_of_floats<Avx512>(),
    {&pack_pairs, &multiply<Pairs, Add>, &multiply<Pairs, Square>, Pairs::rows_a_line}};

}  // namespace kfade::cpu
