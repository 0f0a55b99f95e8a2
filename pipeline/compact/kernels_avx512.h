// Kinds of values (see kernels_rows.h) for AVX-512 with VBMI2 and VNNI, and perhaps BF16.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// The value is hidden from the compiler, so that it emits the merging form of expand. The zeroing form waits, on AMD, for the
// register's previous value, which doubles the time of a product.
inline __m512i hidden(__m512i value) {
  asm("" : "+v"(value));
  return value;
}

inline uint64_t first(int64_t count) {  // a mask of the lowest `count` bits
  return count >= 64 ? ~0ull : count <= 0 ? 0ull : (1ull << count) - 1;
}

// 16 numbers as A's, rounded to the nearest; exact where they are A's already
template <class A>
inline void store_floats(A* to, __m512 v, int64_t count) {
  const __mmask16 some = first(count);
  if constexpr (std::is_same_v<A, float>) {
    _mm512_mask_storeu_ps(to, some, v);
  } else if constexpr (std::is_same_v<A, c10::Half>) {
    _mm256_mask_storeu_epi16(to, some, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_mask_storeu_epi16(to, some, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
}

template <class D>
struct Wide {
  using A = D;
  using V = D;
  using Acc = __m512;
  static constexpr int PER = 1, HEADER = 0;
  template <class X>
  static Acc start(const X*) { return _mm512_setzero_ps(); }
  static Acc plus(Acc a, Acc b) { return _mm512_add_ps(a, b); }
  template <class X>
  static float sum(Acc acc, const X*) { return _mm512_reduce_add_ps(acc); }
};

template <class D>
struct Words : Wide<D> {  // 32 weights of 16 bits
  using Vector = __m512i;
  using Mask = __mmask32;
  static constexpr int BLOCK = 32;
  static Vector load(const D* p) { return _mm512_loadu_si512(p); }
  static Vector load(const D* p, int64_t count) { return _mm512_maskz_loadu_epi16(first(count), p); }
  static Vector spread(Mask mask, Vector v) { return _mm512_mask_expand_epi16(hidden(_mm512_setzero_si512()), mask, v); }
  static void store(D* to, Vector v, int64_t count, float) { _mm512_mask_storeu_epi16(to, first(count), v); }
};

struct KBFloat16 : Words<c10::BFloat16> {
#if defined(__AVX512BF16__)
  using X = uint16_t;
  static void pack(const A* from, X* to, int64_t count) { std::memcpy(to, from, 2 * count); }
  static Acc add(Acc acc, Vector v, const X* x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)v, (__m512bh)_mm512_load_si512(x));
  }
#else
  using X = float;
  static void pack(const A* from, X* to, int64_t count) {  // per 32 inputs: the even ones, then the odd ones
    for (int64_t i = 0; i < count; i++) to[i / 32 * 32 + i % 2 * 16 + i % 32 / 2] = from[i];
  }
  static Acc add(Acc acc, Vector v, const X* x) {
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)));
    return _mm512_fmadd_ps(odd, _mm512_load_ps(x + 16), _mm512_fmadd_ps(even, _mm512_load_ps(x), acc));
  }
#endif
};

struct KHalf : Words<c10::Half> {
  using X = float;
  static void pack(const A* from, X* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = from[i];
  }
  static Acc add(Acc acc, Vector v, const X* x) {
    const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(v));
    const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1));
    return _mm512_fmadd_ps(high, _mm512_load_ps(x + 16), _mm512_fmadd_ps(low, _mm512_load_ps(x), acc));
  }
};

struct KFloat : Wide<float> {  // 16 weights
  using X = float;
  using Vector = __m512;
  using Mask = __mmask16;
  static constexpr int BLOCK = 16;
  static void pack(const A* from, X* to, int64_t count) { std::memcpy(to, from, 4 * count); }
  static Vector load(const V* p) { return _mm512_loadu_ps(p); }
  static Vector load(const V* p, int64_t count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static Vector spread(Mask mask, Vector v) {
    return _mm512_mask_expand_ps(_mm512_castsi512_ps(hidden(_mm512_setzero_si512())), mask, v);
  }
  static void store(A* to, Vector v, int64_t count, float) { _mm512_mask_storeu_ps(to, first(count), v); }
  static Acc add(Acc acc, Vector v, const X* x) { return _mm512_fmadd_ps(v, _mm512_load_ps(x), acc); }
};

// 64 weights of 8 bits, stored as value + 128. An input becomes integers of 24 bits, relative to its largest number, which are
// three digits of 8 bits with a sign: VNNI multiplies 64 of them by the values at once, exactly. That is as precise as float32,
// and needs no conversion of the values. The packed input: per sum of each digit what the 128's amount to, negative; the scale;
// then for every 64 columns the low digits, the middle and the high ones.
template <class D>
struct KInt8 {
  using A = D;
  using V = uint8_t;
  using X = uint8_t;
  using Vector = __m512i;
  using Mask = __mmask64;
  struct Acc { __m512i digit[3]; };
  static constexpr int BLOCK = 64, PER = 3, HEADER = 4 * 64;
  static constexpr float LIMIT = 8e6f;  // 127 * (65536 + 256 + 1), less a margin
  static Vector offset() { return _mm512_set1_epi8(-128); }
  static Vector load(const V* p) { return _mm512_loadu_si512(p); }
  static Vector load(const V* p, int64_t count) { return _mm512_maskz_loadu_epi8(first(count), p); }
  static Vector spread(Mask mask, Vector v) { return _mm512_mask_expand_epi8(hidden(offset()), mask, v); }
  static Acc start(const X* x) {
    return {_mm512_load_si512(x), _mm512_load_si512(x + 64), _mm512_load_si512(x + 128)};
  }
  static Acc plus(Acc a, Acc) { return a; }
  static Acc add(Acc acc, Vector v, const X* x) {
    for (int i = 0; i < 3; i++) acc.digit[i] = _mm512_dpbusd_epi32(acc.digit[i], v, _mm512_load_si512(x + 64 * i));
    return acc;
  }
  static float sum(Acc acc, const X* x) {
    float scale;
    std::memcpy(&scale, x + 192, 4);
    const __m512 low = _mm512_cvtepi32_ps(acc.digit[0]), middle = _mm512_cvtepi32_ps(acc.digit[1]);
    const __m512 more = _mm512_fmadd_ps(middle, _mm512_set1_ps(256), low);
    return scale * _mm512_reduce_add_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(acc.digit[2]), _mm512_set1_ps(65536), more));
  }
  static void pack(const A* from, X* to, int64_t count) {
    float largest = 0, nonfinite = 0;  // the second is NaN where a number is no finite one
#pragma omp simd reduction(max : largest) reduction(+ : nonfinite)
    for (int64_t i = 0; i < count; i++) {
      const float number = from[i];
      largest = std::max(largest, std::abs(number));
      nonfinite += number * 0;
    }
    const float scale = largest / LIMIT + nonfinite, inverse = largest > 1e-30f ? LIMIT / largest : 0;
    Acc sums = {};
    for (int64_t start = 0; start < count; start += 64) {
      alignas(64) float numbers[64] = {};
      for (int64_t i = 0; i < std::min<int64_t>(64, count - start); i++) numbers[i] = static_cast<float>(from[start + i]) * inverse;
      X* digits = to + HEADER + PER * start;
      for (int i = 0; i < 64; i += 16) {
        __m512i rest = _mm512_cvtps_epi32(_mm512_load_ps(numbers + i));
        for (int d = 0; d < 3; d++) {
          const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
          _mm_store_si128(reinterpret_cast<__m128i*>(digits + 64 * d + i), _mm512_cvtepi32_epi8(digit));
          rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, digit), 8);
        }
      }
      sums = add(sums, offset(), digits);
    }
    for (int d = 0; d < 3; d++) _mm512_store_si512(to + 64 * d, _mm512_sub_epi32(_mm512_setzero_si512(), sums.digit[d]));
    std::memcpy(to + 192, &scale, 4);
  }
  static void store(A* to, Vector v, int64_t count, float scale) {
    alignas(64) uint8_t bytes[64];
    _mm512_store_si512(bytes, v);
    for (int64_t i = 0; i < std::min<int64_t>(64, count); i += 16) {
      const __m512i wide = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes + i)));
      const __m512 numbers = _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, _mm512_set1_epi32(128)));
      store_floats(to + i, _mm512_mul_ps(numbers, _mm512_set1_ps(scale)), count - i);
    }
  }
};

}  // namespace
