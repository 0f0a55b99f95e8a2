// Multiplies a few tokens with a compact matrix (one bit per weight and the kept values) or a dense one. Built by kernels.py.
//
// A row is `stride` bytes of mask, lowest bit first, and the kept values from offsets[row] to offsets[row + 1]. A vector of
// values is loaded, spread to the positions of the set bits, and multiplied; zeros are never read. Sums are float32.
// A load may run past its row but never past the values: the last rows load exactly ("careful").
// The caller must have checked that the offsets match the bit counts.
//
// The compiler flags choose AVX-512 with VBMI2 (and perhaps BF16), AVX2, or neither. K is the value type for each:
//   V, X         a stored weight; an input in the form that is multiplied
//   BLOCK        columns per step
//   pack         converts inputs to X
//   load, spread, add   loads values; spreads them to their positions; acc += values * inputs
//   zero, plus, sum     on vectors of sums

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI2__)
#define EXPANDS
#endif

namespace {

constexpr int64_t AHEAD = 4096;  // prefetch distance in bytes of values
constexpr int TOKENS = 4;        // tokens that share one pass over a row
constexpr int64_t WORD = 64;     // columns per load of the mask
constexpr int64_t GRAIN = 1 << 16;  // weights per thread; fewer are not worth one

struct BFloat16 { using V = c10::BFloat16; };
struct Half { using V = c10::Half; };
struct Float { using V = float; };

inline uint64_t whole_word(const uint8_t* mask) {
  uint64_t word;
  std::memcpy(&word, mask, 8);
  return word;
}

inline uint64_t last_word(const uint8_t* mask, int64_t bytes) {  // the rest of a row, under 8 bytes
  uint64_t word = 0;
  for (int64_t i = 0; i < bytes; i++) word |= static_cast<uint64_t>(mask[i]) << (8 * i);
  return word;
}

// `step(column, word)` for each 64 columns of a row's mask
template <class Step>
inline void for_each_word(const uint8_t* mask, int64_t columns, const Step& step) {
  int64_t start = 0;
  for (; start + WORD <= columns; start += WORD) step(start, whole_word(mask + start / 8));
  if (start < columns) step(start, last_word(mask + start / 8, (columns - start + 7) / 8));
}

#if defined(EXPANDS)
constexpr bool VECTORS = true;

// Zeros in a register whose value is hidden from the compiler, so that it emits the merging form of expand. The zeroing form
// waits, on AMD, for the register's previous value, which doubles the time of a product.
inline __m512i nothing() {
  __m512i zeros = _mm512_setzero_si512();
  asm("" : "+v"(zeros));
  return zeros;
}

inline uint32_t first(int64_t count, int most) {  // a mask of `count` bits, clamped to 0..most
  return count >= 32 ? ~0u : count <= 0 ? 0u : count >= most ? (1ull << most) - 1 : (1u << count) - 1;
}

template <class D>
struct Wide : D {
  using Acc = __m512;
  static Acc zero() { return _mm512_setzero_ps(); }
  static Acc plus(Acc a, Acc b) { return _mm512_add_ps(a, b); }
  static float sum(Acc acc) { return _mm512_reduce_add_ps(acc); }
};

template <class D>
struct Words : Wide<D> {  // 32 weights of 16 bits
  using V = typename D::V;
  using Vector = __m512i;
  static constexpr int BLOCK = 32;
  using Mask = __mmask32;
  static Vector load(const V* p) { return _mm512_loadu_si512(p); }
  static Vector load(const V* p, int64_t count) { return _mm512_maskz_loadu_epi16(first(count, 32), p); }
  static Vector spread(Mask mask, Vector v) { return _mm512_mask_expand_epi16(nothing(), mask, v); }
  static void store(V* p, Vector v, int64_t count) { _mm512_mask_storeu_epi16(p, first(count, 32), v); }
};

struct KBFloat16 : Words<BFloat16> {
#if defined(__AVX512BF16__)
  using X = uint16_t;
  static void pack(const V* from, X* to, int64_t count) { std::memcpy(to, from, 2 * count); }
  static Acc add(Acc acc, Vector v, const X* x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)v, (__m512bh)_mm512_loadu_si512(x));
  }
#else
  using X = float;
  static void pack(const V* from, X* to, int64_t count) {  // per 32 inputs: the even ones, then the odd ones
    for (int64_t i = 0; i < count; i++) to[i / 32 * 32 + i % 2 * 16 + i % 32 / 2] = from[i];
  }
  static Acc add(Acc acc, Vector v, const X* x) {
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)));
    return _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + 16), _mm512_fmadd_ps(even, _mm512_loadu_ps(x), acc));
  }
#endif
};

struct KHalf : Words<Half> {
  using X = float;
  static void pack(const V* from, X* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = from[i];
  }
  static Acc add(Acc acc, Vector v, const X* x) {
    const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(v));
    const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
    return _mm512_fmadd_ps(high, _mm512_loadu_ps(x + 16), _mm512_fmadd_ps(low, _mm512_loadu_ps(x), acc));
  }
};

struct KFloat : Wide<Float> {  // 16 weights
  using X = float;
  using Vector = __m512;
  static constexpr int BLOCK = 16;
  using Mask = __mmask16;
  static void pack(const V* from, X* to, int64_t count) { std::memcpy(to, from, 4 * count); }
  static Vector load(const V* p) { return _mm512_loadu_ps(p); }
  static Vector load(const V* p, int64_t count) { return _mm512_maskz_loadu_ps(first(count, 16), p); }
  static Vector spread(Mask mask, Vector v) { return _mm512_mask_expand_ps(_mm512_castsi512_ps(nothing()), mask, v); }
  static void store(V* p, Vector v, int64_t count) { _mm512_mask_storeu_ps(p, first(count, 16), v); }
  static Acc add(Acc acc, Vector v, const X* x) { return _mm512_fmadd_ps(v, _mm512_loadu_ps(x), acc); }
};

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr bool VECTORS = true;

// for each mask byte, the value that goes to each of 8 positions; negative: none
const auto PLACES = [] {
  std::array<std::array<int8_t, 8>, 256> table;
  for (int mask = 0; mask < 256; mask++)
    for (int i = 0, next = 0; i < 8; i++) table[mask][i] = mask >> i & 1 ? next++ : -1;
  return table;
}();

// 8 weights as float32
template <class D>
struct Eight : D {
  using V = typename D::V;
  using X = float;
  using Vector = __m256;
  using Acc = __m256;
  static constexpr int BLOCK = 8;
  using Mask = uint8_t;
  static Acc zero() { return _mm256_setzero_ps(); }
  static Acc plus(Acc a, Acc b) { return _mm256_add_ps(a, b); }
  static float sum(Acc acc) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static void pack(const V* from, X* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = from[i];
  }
  static Vector load(const V* p) {
    if constexpr (std::is_same_v<V, float>) {
      return _mm256_loadu_ps(p);
    } else {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (std::is_same_v<V, c10::Half>) return _mm256_cvtph_ps(v);
      else return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    }
  }
  static Vector load(const V* p, int64_t count) {
    V some[8] = {};
    if (count > 0) std::memcpy(static_cast<void*>(some), p, sizeof(V) * std::min<int64_t>(count, 8));
    return load(some);
  }
  static Vector spread(Mask mask, Vector v) {
    const __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(PLACES[mask].data())));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(v, places), zero(), _mm256_castsi256_ps(places));
  }
  static Acc add(Acc acc, Vector v, const X* x) { return _mm256_fmadd_ps(v, _mm256_loadu_ps(x), acc); }
};
using KBFloat16 = Eight<BFloat16>;
using KHalf = Eight<Half>;
using KFloat = Eight<Float>;

#else
constexpr bool VECTORS = false;
template <class D>
struct One : D {
  using X = float;
  static void pack(const typename D::V* from, X* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = from[i];
  }
};
using KBFloat16 = One<BFloat16>;
using KHalf = One<Half>;
using KFloat = One<Float>;
#endif

// the product of one row: its mask, its values at `p` (`end`: of all values), T inputs `x`, `width` apart, zero-padded
template <class K, int T, bool CAREFUL>
void sparse_row(const uint8_t* mask, int64_t columns, const typename K::V* p, const typename K::V* end,
                const typename K::X* x, int64_t width, float* out) {
  if constexpr (VECTORS) {
    typename K::Acc acc[T][2];
    for (int t = 0; t < T; t++) acc[t][0] = acc[t][1] = K::zero();
    for_each_word(mask, columns, [&](int64_t start, uint64_t word) {
      __builtin_prefetch(reinterpret_cast<const char*>(p) + AHEAD);
#pragma GCC unroll 8
      for (int64_t part = 0; part < WORD / K::BLOCK; part++) {
        const auto here = static_cast<typename K::Mask>(word >> (part * K::BLOCK));
        const auto values = K::spread(here, CAREFUL ? K::load(p, end - p) : K::load(p));
        p += __builtin_popcountll(here);
        for (int t = 0; t < T; t++)
          acc[t][part % 2] = K::add(acc[t][part % 2], values, x + t * width + start + part * K::BLOCK);
      }
    });
    for (int t = 0; t < T; t++) out[t] = K::sum(K::plus(acc[t][0], acc[t][1]));
  } else {
    float acc[T] = {};
    for_each_word(mask, columns, [&](int64_t start, uint64_t word) {
      for (; word; word &= word - 1) {
        const float value = *p++;
        for (int t = 0; t < T; t++) acc[t] += value * x[t * width + start + __builtin_ctzll(word)];
      }
    });
    for (int t = 0; t < T; t++) out[t] = acc[t];
  }
}

template <class K, int T>
void dense_row(const typename K::V* p, int64_t columns, const typename K::X* x, int64_t width, float* out) {
  if constexpr (VECTORS) {
    typename K::Acc acc[T][4];
    for (int t = 0; t < T; t++) acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = K::zero();
    int64_t start = 0;
    for (; start + 4 * K::BLOCK <= columns; start += 4 * K::BLOCK)
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++) {
        const auto values = K::load(p + start + part * K::BLOCK);
        for (int t = 0; t < T; t++) acc[t][part] = K::add(acc[t][part], values, x + t * width + start + part * K::BLOCK);
      }
    for (; start < columns; start += K::BLOCK) {
      const auto values = K::load(p + start, columns - start);
      for (int t = 0; t < T; t++) acc[t][0] = K::add(acc[t][0], values, x + t * width + start);
    }
    for (int t = 0; t < T; t++)
      out[t] = K::sum(K::plus(K::plus(acc[t][0], acc[t][1]), K::plus(acc[t][2], acc[t][3])));
  } else {
    float acc[T] = {};
    for (int64_t i = 0; i < columns; i++)
      for (int t = 0; t < T; t++) acc[t] += static_cast<float>(p[i]) * x[t * width + i];
    for (int t = 0; t < T; t++) out[t] = acc[t];
  }
}

// calls `row(r, number of tokens, their inputs, sums)` for all rows and tokens, split over threads
template <class K, class Row>
at::Tensor products(const at::Tensor& x, int64_t rows, const std::optional<at::Tensor>& bias, const Row& row) {
  using V = typename K::V;
  const int64_t tokens = x.size(0), columns = x.size(1), width = (columns + WORD - 1) / WORD * WORD;
  // aligned to cache lines: a load across two of them takes twice as long
  const at::Tensor memory = at::zeros({tokens * width * static_cast<int64_t>(sizeof(typename K::X))}, at::kByte);
  auto* packed = reinterpret_cast<typename K::X*>(memory.mutable_data_ptr<uint8_t>());
  for (int64_t t = 0; t < tokens; t++) K::pack(x.const_data_ptr<V>() + t * columns, packed + t * width, columns);
  at::Tensor out = at::empty({tokens, rows}, x.options());
  V* to = out.mutable_data_ptr<V>();
  const V* more = bias ? bias->const_data_ptr<V>() : nullptr;
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t t = 0; t < tokens; t += TOKENS) {
        const int count = std::min<int64_t>(TOKENS, tokens - t);
        float sums[TOKENS];
        row(r, count, packed + t * width, width, sums);
        for (int i = 0; i < count; i++)
          to[(t + i) * rows + r] = static_cast<V>(more ? sums[i] + static_cast<float>(more[r]) : sums[i]);
      }
  });
  return out;
}

template <class F>
auto with_kind(at::ScalarType dtype, const F& f) {
  if (dtype == at::kBFloat16) return f(KBFloat16{});
  if (dtype == at::kHalf) return f(KHalf{});
  TORCH_CHECK(dtype == at::kFloat, "no kernel for ", dtype);
  return f(KFloat{});
}

void check(const at::Tensor& tensor, at::ScalarType dtype, int64_t dims, const char* name) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.scalar_type() == dtype && tensor.dim() == dims && tensor.is_contiguous(),
              name, " must be contiguous, on the CPU, ", dtype, ", of ", dims, " dimensions");
}

void check_input(const at::Tensor& x, at::ScalarType dtype, int64_t rows, const std::optional<at::Tensor>& bias) {
  check(x, dtype, 2, "input");
  if (bias) {
    check(*bias, dtype, 1, "bias");
    TORCH_CHECK(bias->size(0) == rows, "bias has another size");
  }
}

void check_matrix(const at::Tensor& mask, const at::Tensor& values, const at::Tensor& offsets, int64_t columns) {
  check(mask, at::kByte, 2, "mask");
  check(values, values.scalar_type(), 1, "values");
  check(offsets, at::kLong, 1, "offsets");
  TORCH_CHECK(mask.size(1) == (columns + 7) / 8 && offsets.size(0) == mask.size(0) + 1, "mask or offsets have another size");
  const int64_t* o = offsets.const_data_ptr<int64_t>();
  TORCH_CHECK(o[0] >= 0 && o[mask.size(0)] <= values.size(0), "offsets lie outside the values");
}

at::Tensor product(const at::Tensor& mask, const at::Tensor& values, const at::Tensor& offsets, const at::Tensor& x,
                   const std::optional<at::Tensor>& bias) {
  const int64_t rows = mask.size(0), columns = x.size(-1), stride = mask.size(1);
  check_matrix(mask, values, offsets, columns);
  check_input(x, values.scalar_type(), rows, bias);
  return with_kind(values.scalar_type(), [&](auto kind) {
    using K = decltype(kind);
    const auto* v = values.const_data_ptr<typename K::V>();
    const auto* end = v + values.size(0);
    const uint8_t* m = mask.const_data_ptr<uint8_t>();
    const int64_t* o = offsets.const_data_ptr<int64_t>();
    const int64_t safe = values.size(0) - WORD;  // rows that end before it may load whole vectors
    return products<K>(x, rows, bias, [=](int64_t r, int count, const typename K::X* inputs, int64_t width, float* sums) {
      const auto call = [&](auto tokens, auto careful) {
        sparse_row<K, tokens(), careful()>(m + r * stride, columns, v + o[r], end, inputs, width, sums);
      };
      const auto with = [&](auto tokens) {
        o[r + 1] <= safe ? call(tokens, std::false_type{}) : call(tokens, std::true_type{});
      };
      switch (count) {
        case 1: return with(std::integral_constant<int, 1>{});
        case 2: return with(std::integral_constant<int, 2>{});
        case 3: return with(std::integral_constant<int, 3>{});
        default: return with(std::integral_constant<int, 4>{});
      }
    });
  });
}

at::Tensor dense(const at::Tensor& weight, const at::Tensor& x, const std::optional<at::Tensor>& bias) {
  check(weight, weight.scalar_type(), 2, "weight");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check_input(x, weight.scalar_type(), rows, bias);
  TORCH_CHECK(x.size(1) == columns, "input has another size");
  return with_kind(weight.scalar_type(), [&](auto kind) {
    using K = decltype(kind);
    const auto* w = weight.const_data_ptr<typename K::V>();
    return products<K>(x, rows, bias, [=](int64_t r, int count, const typename K::X* inputs, int64_t width, float* sums) {
      const auto* p = w + r * columns;
      switch (count) {
        case 1: return dense_row<K, 1>(p, columns, inputs, width, sums);
        case 2: return dense_row<K, 2>(p, columns, inputs, width, sums);
        case 3: return dense_row<K, 3>(p, columns, inputs, width, sums);
        default: return dense_row<K, 4>(p, columns, inputs, width, sums);
      }
    });
  });
}

template <class K, class V = typename K::V>
void expand_row(const uint8_t* mask, int64_t columns, const V* p, const V* end, V* to) {
#if defined(EXPANDS)
  for_each_word(mask, columns, [&](int64_t start, uint64_t word) {
    for (int64_t column = start; column < std::min(start + WORD, columns); column += K::BLOCK, word >>= K::BLOCK) {
      const auto here = static_cast<typename K::Mask>(word);
      K::store(to + column, K::spread(here, K::load(p, end - p)), columns - column);
      p += __builtin_popcountll(here);
    }
  });
#else
  for (int64_t i = 0; i < columns; i++) to[i] = mask[i / 8] >> (i % 8) & 1 ? *p++ : V(0);
#endif
}

// writes the dense rows of the matrix to `out` (rows, columns)
void expand(const at::Tensor& mask, const at::Tensor& values, const at::Tensor& offsets, at::Tensor out) {
  const int64_t rows = mask.size(0), columns = out.size(-1), stride = mask.size(1);
  check_matrix(mask, values, offsets, columns);
  check(out, values.scalar_type(), 2, "out");
  TORCH_CHECK(out.size(0) == rows, "out has another size");
  with_kind(values.scalar_type(), [&](auto kind) {
    using K = decltype(kind);
    const auto* v = values.const_data_ptr<typename K::V>();
    const auto* end = v + values.size(0);
    const uint8_t* m = mask.const_data_ptr<uint8_t>();
    const int64_t* o = offsets.const_data_ptr<int64_t>();
    auto* to = out.mutable_data_ptr<typename K::V>();
    at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / columns), [=](int64_t begin, int64_t last) {
      for (int64_t r = begin; r < last; r++) expand_row<K>(m + r * stride, columns, v + o[r], end, to + r * columns);
    });
    return 0;
  });
}

}  // namespace

TORCH_LIBRARY(TORCH_EXTENSION_NAME, library) {
  library.def("product(Tensor mask, Tensor values, Tensor offsets, Tensor x, Tensor? bias) -> Tensor", &product);
  library.def("expand(Tensor mask, Tensor values, Tensor offsets, Tensor(a!) out) -> ()", &expand);
  library.def("dense(Tensor weight, Tensor x, Tensor? bias) -> Tensor", &dense);
}
