// One row of a matrix times a few tokens, and one row made dense. Sums are float32.
//
// A compact row is a mask, lowest bit first, and the kept values. A vector of values is loaded, spread to the positions of the
// set bits, and multiplied; zeros are never read. A load may run past its row but never past `end`, the end of all values: the
// last rows load exactly (CAREFUL).
//
// K, a kind of values, comes from the header of the instructions:
//   A, V          a number of the inputs and outputs; a stored value
//   BLOCK         columns per vector, a divisor of 64
//   X, PER, HEADER   a packed input is HEADER X's, then PER X's for each column
//   pack          converts an input to this form, after which come zeros up to a multiple of 64 columns
//   load, spread, add   loads values; spreads them to their positions; acc += values * inputs
//   start, plus, sum    on accumulators; `start` and `sum` see the packed input
//   store         writes spread values as A's; `scale` is for int8 alone
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace {

constexpr int64_t AHEAD = 8192;  // prefetch distance in bytes: the hardware stops at each page
constexpr int64_t WORD = 64;     // columns per load of the mask

#define INLINE __attribute__((always_inline))

// f(0), ..., f(N - 1) with constants: accumulators that a loop indexes would stay in memory
template <int N, class F>
INLINE inline void unrolled(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) INLINE { (f(std::integral_constant<int, I>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

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
INLINE inline void for_each_word(const uint8_t* mask, int64_t columns, const Step& step) {
  int64_t start = 0;
  for (; start + WORD <= columns; start += WORD) step(start, whole_word(mask + start / 8));
  if (start < columns) step(start, last_word(mask + start / 8, (columns - start + 7) / 8));
}

// `x`: T packed inputs, `stride` X's apart
template <class K, int T, bool CAREFUL>
INLINE inline void sparse_row(const uint8_t* mask, int64_t columns, const typename K::V* p, const typename K::V* end,
                const typename K::X* x, int64_t stride, float* out) {
  constexpr int PARTS = WORD / K::BLOCK, CHAINS = PARTS == 1 ? 1 : 2;  // two sums, so that one addition need not await another
  typename K::Acc acc[T][CHAINS];
  unrolled<T>([&](auto t) INLINE {
    acc[t][0] = K::start(x + t * stride);
    if constexpr (CHAINS == 2) acc[t][1] = typename K::Acc{};
  });
  for_each_word(mask, columns, [&](int64_t start, uint64_t word) INLINE {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + AHEAD);
    unrolled<PARTS>([&](auto part) INLINE {
      const auto here = static_cast<typename K::Mask>(word >> (part * K::BLOCK));
      const auto values = K::spread(here, CAREFUL ? K::load(p, end - p) : K::load(p));
      p += __builtin_popcountll(here);
      const auto* inputs = x + K::HEADER + K::PER * (start + part * K::BLOCK);
      unrolled<T>([&](auto t) INLINE {
        acc[t][part % CHAINS] = K::add(acc[t][part % CHAINS], values, inputs + t * stride);
      });
    });
  });
  unrolled<T>([&](auto t) INLINE {
    if constexpr (CHAINS == 2) acc[t][0] = K::plus(acc[t][0], acc[t][1]);
    out[t] = K::sum(acc[t][0], x + t * stride);
  });
}

template <class K, int T>
INLINE inline void dense_row(const typename K::V* p, int64_t columns, const typename K::X* x, int64_t stride, float* out) {
  typename K::Acc acc[T][4];
  unrolled<T>([&](auto t) INLINE { acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = typename K::Acc{}; });
  int64_t start = 0;
  for (; start + 4 * K::BLOCK <= columns; start += 4 * K::BLOCK) {
    __builtin_prefetch(reinterpret_cast<const char*>(p + start) + AHEAD);
    unrolled<4>([&](auto part) INLINE {
      const auto values = K::load(p + start + part * K::BLOCK);
      unrolled<T>([&](auto t) INLINE {
        acc[t][part] = K::add(acc[t][part], values, x + t * stride + start + part * K::BLOCK);
      });
    });
  }
  for (; start < columns; start += K::BLOCK) {
    const auto values = K::load(p + start, columns - start);
    unrolled<T>([&](auto t) INLINE { acc[t][0] = K::add(acc[t][0], values, x + t * stride + start); });
  }
  unrolled<T>([&](auto t) INLINE {
    out[t] = K::sum(K::plus(K::plus(acc[t][0], acc[t][1]), K::plus(acc[t][2], acc[t][3])), x + t * stride);
  });
}

template <class K>
void expand_row(const uint8_t* mask, int64_t columns, const typename K::V* p, const typename K::V* end, float scale,
                typename K::A* to) {
  for_each_word(mask, columns, [&](int64_t start, uint64_t word) INLINE {
    for (int64_t column = start; column < start + WORD && column < columns; column += K::BLOCK) {
      const auto here = static_cast<typename K::Mask>(word >> (column - start));
      K::store(to + column, K::spread(here, K::load(p, end - p)), columns - column, scale);
      p += __builtin_popcountll(here);
    }
  });
}

}  // namespace
