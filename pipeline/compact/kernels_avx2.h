// Kinds of values (see kernels_rows.h) for AVX2: 8 weights as float32.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// for each mask byte, the value that goes to each of 8 positions; negative: none
const auto PLACES = [] {
  std::array<std::array<int8_t, 8>, 256> table;
  for (int mask = 0; mask < 256; mask++)
    for (int i = 0, next = 0; i < 8; i++) table[mask][i] = mask >> i & 1 ? next++ : -1;
  return table;
}();

// stored S's; inputs and outputs D
template <class D, class S = D>
struct Eight {
  using A = D;
  using V = S;
  using X = float;
  using Vector = __m256;
  using Acc = __m256;
  using Mask = uint8_t;
  static constexpr int BLOCK = 8, PER = 1, HEADER = 0;
  static Acc start(const X*) { return _mm256_setzero_ps(); }
  static Acc plus(Acc a, Acc b) { return _mm256_add_ps(a, b); }
  static float sum(Acc acc, const X*) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static void pack(const A* from, X* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = from[i];
  }
  static Vector load(const V* p) {
    const auto* vector = reinterpret_cast<const __m128i*>(p);
    if constexpr (std::is_same_v<V, float>) {
      return _mm256_loadu_ps(p);
    } else if constexpr (std::is_same_v<V, uint8_t>) {  // value + 128
      const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(vector));
      return _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, _mm256_set1_epi32(128)));
    } else if constexpr (std::is_same_v<V, c10::Half>) {
      return _mm256_cvtph_ps(_mm_loadu_si128(vector));
    } else {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(vector)), 16));
    }
  }
  static Vector load(const V* p, int64_t count) {
    V some[8] = {};
    if (count > 0) std::memcpy(static_cast<void*>(some), p, sizeof(V) * std::min<int64_t>(count, 8));
    return load(some);
  }
  static Vector spread(Mask mask, Vector v) {
    const __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(PLACES[mask].data())));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(v, places), _mm256_setzero_ps(), _mm256_castsi256_ps(places));
  }
  static Acc add(Acc acc, Vector v, const X* x) { return _mm256_fmadd_ps(v, _mm256_load_ps(x), acc); }
  static void store(A* to, Vector v, int64_t count, float scale) {
    if constexpr (std::is_same_v<V, uint8_t>) v = _mm256_mul_ps(v, _mm256_set1_ps(scale));
    A eight[8];
    auto* vector = reinterpret_cast<__m128i*>(eight);
    if constexpr (std::is_same_v<A, float>) {
      _mm256_storeu_ps(eight, v);
    } else if constexpr (std::is_same_v<A, c10::Half>) {
      _mm_storeu_si128(vector, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {  // to the nearest; exact where they are bfloat16 already
      const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i words = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
      _mm_storeu_si128(vector, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }
    std::memcpy(static_cast<void*>(to), eight, sizeof(A) * std::min<int64_t>(count, 8));
  }
};

using KBFloat16 = Eight<c10::BFloat16>;
using KHalf = Eight<c10::Half>;
using KFloat = Eight<float>;
template <class D>
using KInt8 = Eight<D, uint8_t>;

}  // namespace
