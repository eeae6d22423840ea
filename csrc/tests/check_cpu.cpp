// The kernels for processors over odd shapes, for the sanitizers (`make sanitize`): against double loops, between pages
// that may not be touched, so that vector loads which no sanitizer sees are caught too.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/isa.h"
#include "cpu/operations.h"
#include "packed.h"

using namespace kfade;
using namespace kfade::cpu;

namespace {

std::mt19937 generator(0);
long checks = 0;

float normal() { return std::normal_distribution<float>()(generator); }

// Memory that ends, or begins, beside a page that faults.
template <class T>
class Guarded {
 public:
  Guarded(std::int64_t count, bool at_end) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), bytes = count * sizeof(T);
    const std::size_t inside = (bytes + page - 1) / page * page;
    size_ = inside + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || (inside > 0 && mprotect(base_ + page, inside, PROT_READ | PROT_WRITE) != 0)) std::abort();
    data_ = reinterpret_cast<T*>(base_ + page + (at_end ? inside - bytes : 0));
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  T* data() { return data_; }
  T& operator[](std::int64_t i) { return data_[i]; }

 private:
  char* base_;
  std::size_t size_;
  T* data_;
};

// Rows in one of the three types, and what they are in double.
struct Sample {
  Guarded<char> bytes;
  std::vector<double> values;  // [count, columns], the ones included
  Rows rows;

  Sample(std::int64_t count, std::int64_t width, bool ones, Element element, bool at_end)
      : bytes(count * width * (element == Element::f32 ? 4 : 2), at_end),
        rows{bytes.data(), element, width, width, ones} {
    for (std::int64_t r = 0; r < count; ++r) {
      for (std::int64_t c = 0; c < width; ++c) values.push_back(put(r * width + c, normal(), element));
      if (ones) values.push_back(1.0);
    }
  }

  double put(std::int64_t i, float x, Element element) {
    if (element == Element::f32) {
      std::memcpy(bytes.data() + 4 * i, &x, 4);
      return x;
    }
    std::uint32_t bits;
    std::uint16_t half;
    if (element == Element::bf16) {
      std::memcpy(&bits, &x, 4);
      half = static_cast<std::uint16_t>(bits >> 16);
      bits = static_cast<std::uint32_t>(half) << 16;
      std::memcpy(&x, &bits, 4);
    } else {
      // Whole eighths, which a half holds exactly.
      x = std::fmax(-3.875f, std::fmin(3.875f, std::round(x * 8) / 8));
      half = x == 0 ? 0 : static_cast<std::uint16_t>((std::signbit(x) << 15) | ((std::ilogb(x) + 15) << 10) |
                                                     static_cast<int>((std::fabs(x) / std::ldexp(1, std::ilogb(x)) - 1) * 1024));
    }
    std::memcpy(bytes.data() + 2 * i, &half, 2);
    return x;
  }
};

void expect(double value, double truth, double scale, const char* what, const char* isa) {
  ++checks;
  if (!(std::fabs(value - truth) <= 1e-5 * scale + 1e-5)) {
    std::fprintf(stderr, "%s, %s: %g is not %g\n", what, isa, value, truth);
    std::exit(1);
  }
}

void check_syrk(const Kernels& isa, Element element, std::int64_t order, std::int64_t count, bool ones, bool at_end) {
  if (order == 0 || order < ones) return;
  Sample x(count, order - ones, ones, element, at_end);
  Guarded<std::uint8_t> mask(count, at_end);
  for (std::int64_t r = 0; r < count; ++r) mask[r] = generator() % 4 != 0;
  Guarded<float> packed(packed_elements(order), at_end);
  for (std::int64_t i = 0; i < packed_elements(order); ++i) packed[i] = 0.5f;
  syrk(isa, {3, 3 * isa.lanes}, packed.data(), x.rows, count, mask.data(), -2.0f, 1);
  for (std::int64_t p = 0; p < panel_count(order); ++p) {
    const Panel at = panel(order, p);
    for (std::int64_t i = at.start; i < at.stop; ++i) {
      for (std::int64_t j = 0; j <= i; ++j) {
        double sum = 0, scale = 0;
        for (std::int64_t r = 0; r < count; ++r) {
          const double term = mask[r] ? x.values[r * order + i] * x.values[r * order + j] : 0;
          sum += term, scale += std::fabs(term);
        }
        expect(packed[at.offset + (i - at.start) * at.stop + j], 0.5 - 2 * sum, 2 * scale, "syrk", isa.name);
      }
    }
  }
}

void check_squares(const Kernels& isa, Element one, Element two, std::int64_t rows, std::int64_t columns, bool ones,
                   bool at_end) {
  const std::vector<std::int64_t> offsets{0, 1, 1, 6, 13};
  const std::int64_t count = offsets.back(), all = columns + ones;
  Sample left(count, rows, false, one, at_end), right(count, columns, ones, two, at_end);
  // The last row of the result ends where its columns do.
  Guarded<float> out((rows - 1) * (all + 3) + all, at_end);
  for (std::int64_t i = 0; i < (rows - 1) * (all + 3) + all; ++i) out[i] = 0.5f;
  squares(isa, {4, isa.lanes}, out.data(), all + 3, left.rows, right.rows, offsets, nullptr, 1);
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < all + (i + 1 < rows ? 3 : 0); ++j) {
      double total = 0;
      for (std::size_t s = 0; j < all && s + 1 < offsets.size(); ++s) {
        double sum = 0;
        for (std::int64_t r = offsets[s]; r < offsets[s + 1]; ++r) {
          sum += left.values[r * rows + i] * right.values[r * all + j];
        }
        total += sum * sum;
      }
      expect(out[i * (all + 3) + j], 0.5 + total, 10 * (total + 1), "squares", isa.name);
    }
  }
}

}  // namespace

int main() {
  const std::vector<std::int64_t> widths{1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 31, 33, 48, 49, 127, 128, 129, 150};
  for (const Kernels* isa : supported()) {
    for (Element element : {Element::f32, Element::bf16, Element::f16}) {
      for (std::int64_t order : widths) {
        for (std::int64_t count : {0, 1, 2, 7, 16}) {
          for (bool ones : {false, true}) check_syrk(*isa, element, order, count, ones, (order + count) % 2 == 0);
        }
      }
      for (Element other : {Element::f32, Element::bf16}) {
        for (std::size_t i = 0; i < widths.size(); ++i) {
          check_squares(*isa, element, other, widths[i], widths[widths.size() - 1 - i], i % 2 == 0, i % 3 != 0);
          check_squares(*isa, element, other, widths[i], widths[(5 * i + 3) % widths.size()], i % 2 == 1, i % 3 == 0);
        }
      }
    }
    std::printf("%s: right, after %ld comparisons\n", isa->name, checks);
  }
  return 0;
}
