// The operators for a compact matrix (one bit per weight and the kept values): times a few tokens, times many, or made dense; and
// a dense matrix times a few tokens. Checks, threads, and the choice of kind. Built by kernels.py, whose compiler flags choose the
// instructions. The rows themselves: kernels_rows.h.
//
// A row is `mask.size(1)` bytes of mask, and the values from offsets[row] to offsets[row + 1]. Values are of the inputs' dtype, or
// uint8 (value + 128) with a float32 scale for each row. The caller must have checked that the offsets match the bit counts.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "kernels_rows.h"
#if defined(__AVX512VBMI2__)
#include "kernels_avx512.h"
#else
#include "kernels_avx2.h"
#endif

namespace {

constexpr int TOKENS = 4;           // tokens that share one pass over a row
constexpr int64_t ROWS = 16;        // rows whose sums are made before they are written; the values stay in the cache for more tokens
constexpr int64_t GRAIN = 1 << 17;  // weights per thread; fewer are not worth one
constexpr int64_t TILE = 256;       // rows that a thread makes dense at a time; 128 cost 3% of a product with 512 tokens
constexpr int64_t SMALL = 1 << 22;  // products of weights and inputs; one thread is enough for fewer

using Optional = std::optional<at::Tensor>;

struct alignas(64) Line { char bytes[64]; };  // a load across two lines of the cache takes twice as long

// The inputs in the form that K multiplies; they are valid until this thread packs the next ones.
template <class K>
struct Packed {
  int64_t stride;
  typename K::X* data;
  Packed(const typename K::A* x, int64_t tokens, int64_t columns) {
    static thread_local std::vector<Line> memory;
    const int64_t width = (columns + WORD - 1) / WORD * WORD;
    stride = K::HEADER + K::PER * width;
    const int64_t lines = (tokens * stride * static_cast<int64_t>(sizeof(typename K::X)) + 63) / 64;
    if (static_cast<int64_t>(memory.size()) < lines) memory.resize(lines);
    data = reinterpret_cast<typename K::X*>(memory.data());
    for (int64_t t = 0; t < tokens; t++) {
      typename K::X* to = data + t * stride;
      if (columns < width) std::fill(to + stride - K::PER * WORD, to + stride, typename K::X(0));
      K::pack(x + t * columns, to, columns);
    }
  }
};

// out = sums * scales + bias, where `some(begin, end, constant number of tokens, their packed inputs, sums)` makes the sums of
// rows begin to end, (rows, tokens)
template <class K, class Some>
at::Tensor products(const at::Tensor& input, int64_t rows, const Optional& scales, const Optional& bias, const Some& some) {
  using A = typename K::A;
  const at::Tensor x = input.contiguous();
  const int64_t columns = x.size(-1), tokens = columns ? x.numel() / columns : 0;
  const Packed<K> packed(x.const_data_ptr<A>(), tokens, columns);
  auto shape = x.sizes().vec();
  shape.back() = rows;
  at::Tensor out = at::empty(shape, x.options());
  A* to = out.mutable_data_ptr<A>();
  const A* more = bias ? bias->const_data_ptr<A>() : nullptr;
  const float* scale = scales ? scales->const_data_ptr<float>() : nullptr;
  const auto block = [&](int64_t begin, int64_t end, int64_t token, auto count) {
    float sums[ROWS * TOKENS];
    some(begin, end, count, packed.data + token * packed.stride, packed.stride, sums);
    for (int i = 0; i < count; i++)
      for (int64_t r = begin; r < end; r++) {
        const float sum = sums[(r - begin) * count + i] * (scale ? scale[r] : 1);
        to[(token + i) * rows + r] = static_cast<A>(more ? sum + static_cast<float>(more[r]) : sum);
      }
  };
  const int64_t grain = std::max<int64_t>(ROWS, GRAIN / std::max<int64_t>(columns, 1));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r += ROWS)
      for (int64_t t = 0; t < tokens; t += TOKENS) {
        const int64_t last = std::min(end, r + ROWS);
        switch (tokens - t) {
          case 1: block(r, last, t, std::integral_constant<int, 1>{}); break;
          case 2: block(r, last, t, std::integral_constant<int, 2>{}); break;
          case 3: block(r, last, t, std::integral_constant<int, 3>{}); break;
          default: block(r, last, t, std::integral_constant<int, 4>{});
        }
      }
  });
  return out;
}

// f(kind) for inputs of a dtype, and values of the same dtype or uint8
template <class F>
auto with_kind(at::ScalarType dtype, bool is_int8, const F& f) {
  if (dtype == at::kBFloat16) return is_int8 ? f(KInt8<c10::BFloat16>{}) : f(KBFloat16{});
  if (dtype == at::kHalf) return is_int8 ? f(KInt8<c10::Half>{}) : f(KHalf{});
  TORCH_CHECK(dtype == at::kFloat, "no kernel for ", dtype);
  return is_int8 ? f(KInt8<float>{}) : f(KFloat{});
}

void check(const at::Tensor& tensor, at::ScalarType dtype, int64_t dims, const char* name) {
  TORCH_CHECK(tensor.device().is_cpu() && tensor.scalar_type() == dtype && tensor.dim() == dims && tensor.is_contiguous(),
              name, " must be contiguous, on the CPU, ", dtype, ", of ", dims, " dimensions");
}

void check_input(const at::Tensor& x, at::ScalarType dtype, int64_t rows, int64_t columns, const Optional& bias) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == dtype && x.dim() >= 1 && x.size(-1) == columns,
              "input must be on the CPU, ", dtype, ", of ", columns, " columns");
  if (!bias) return;
  check(*bias, dtype, 1, "bias");
  TORCH_CHECK(bias->size(0) == rows, "bias has another size");
}

void check_matrix(const at::Tensor& mask, const at::Tensor& values, const Optional& scales, const at::Tensor& offsets,
                  at::ScalarType dtype, int64_t columns) {
  const int64_t rows = mask.size(0);
  check(mask, at::kByte, 2, "mask");
  check(values, scales ? at::kByte : dtype, 1, "values");
  check(offsets, at::kLong, 1, "offsets");
  TORCH_CHECK(mask.size(1) == (columns + 7) / 8 && offsets.size(0) == rows + 1, "mask or offsets have another size");
  const int64_t* o = offsets.const_data_ptr<int64_t>();
  TORCH_CHECK(o[0] >= 0 && o[rows] <= values.size(0), "offsets lie outside the values");
  if (!scales) return;
  check(*scales, at::kFloat, 1, "scales");
  TORCH_CHECK(scales->size(0) == rows && columns < 1 << 17, "scales have another size, or there are too many columns for int8");
}

at::Tensor product(const at::Tensor& mask, const at::Tensor& values, const Optional& scales, const at::Tensor& offsets,
                   const at::Tensor& x, const Optional& bias) {
  const int64_t rows = mask.size(0), columns = x.size(-1), stride = mask.size(1);
  check_matrix(mask, values, scales, offsets, x.scalar_type(), columns);
  check_input(x, x.scalar_type(), rows, columns, bias);
  return with_kind(x.scalar_type(), scales.has_value(), [&](auto kind) {
    using K = decltype(kind);
    const auto* v = values.const_data_ptr<typename K::V>();
    const auto* end = v + values.size(0);
    const uint8_t* m = mask.const_data_ptr<uint8_t>();
    const int64_t* o = offsets.const_data_ptr<int64_t>();
    const int64_t safe = values.size(0) - WORD;  // rows that end before it may load whole vectors
    return products<K>(x, rows, scales, bias, [=](int64_t r, int64_t last, auto count, const auto* in, int64_t apart, float* to) {
      const bool careful = o[last] > safe;
      for (; r < last; r++, to += count)
        careful ? sparse_row<K, count(), true>(m + r * stride, columns, v + o[r], end, in, apart, to)
                : sparse_row<K, count(), false>(m + r * stride, columns, v + o[r], end, in, apart, to);
    });
  });
}

at::Tensor dense(const at::Tensor& weight, const at::Tensor& x, const Optional& bias) {
  check(weight, weight.scalar_type(), 2, "weight");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check_input(x, weight.scalar_type(), rows, columns, bias);
  return with_kind(weight.scalar_type(), false, [&](auto kind) -> at::Tensor {
    using K = decltype(kind);
    if constexpr (std::is_same_v<typename K::V, typename K::A>) {
      const auto* w = weight.const_data_ptr<typename K::V>();
      return products<K>(x, rows, {}, bias, [=](int64_t r, int64_t last, auto count, const auto* in, int64_t apart, float* to) {
        for (; r < last; r++, to += count) dense_row<K, count()>(w + r * columns, columns, in, apart, to);
      });
    }
    return {};
  });
}

// f(kind, write), where `write(begin, end, K::A* to)` writes the dense rows begin to end
template <class F>
void with_rows(const at::Tensor& mask, const at::Tensor& values, const Optional& scales, const at::Tensor& offsets,
               at::ScalarType dtype, int64_t columns, const F& f) {
  check_matrix(mask, values, scales, offsets, dtype, columns);
  with_kind(dtype, scales.has_value(), [&](auto kind) {
    using K = decltype(kind);
    const auto* v = values.const_data_ptr<typename K::V>();
    const auto* end = v + values.size(0);
    const uint8_t* m = mask.const_data_ptr<uint8_t>();
    const int64_t* o = offsets.const_data_ptr<int64_t>();
    const float* scale = scales ? scales->const_data_ptr<float>() : nullptr;
    const int64_t stride = mask.size(1);
    f(kind, [=](int64_t begin, int64_t last, typename K::A* to) {
      for (int64_t r = begin; r < last; r++, to += columns)
        expand_row<K>(m + r * stride, columns, v + o[r], end, scale ? scale[r] : 1, to);
    });
    return 0;
  });
}

// writes the dense rows of the matrix to `out` (rows, columns)
void expand(const at::Tensor& mask, const at::Tensor& values, const Optional& scales, const at::Tensor& offsets, at::Tensor out) {
  const int64_t rows = mask.size(0), columns = out.size(-1);
  check(out, out.scalar_type(), 2, "out");
  TORCH_CHECK(out.size(0) == rows, "out has another size");
  with_rows(mask, values, scales, offsets, out.scalar_type(), columns, [&](auto kind, auto write) {
    auto* to = out.mutable_data_ptr<typename decltype(kind)::A>();
    at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(columns, 1)), [=](int64_t begin, int64_t last) {
      write(begin, last, to + begin * columns);
    });
  });
}

// The product with many tokens, x (tokens, columns). Each thread makes TILE of its rows dense at a time and multiplies them by
// torch's own product, on one thread. Up to some 4,000 columns such a tile stays in a cache of 2 MiB.
at::Tensor prefill(const at::Tensor& mask, const at::Tensor& values, const Optional& scales, const at::Tensor& offsets,
                   const at::Tensor& x, const Optional& bias) {
  const int64_t rows = mask.size(0), columns = x.size(-1);
  check_input(x, x.scalar_type(), rows, columns, bias);
  TORCH_CHECK(x.dim() == 2, "input must have 2 dimensions");
  at::Tensor out = at::empty({x.size(0), rows}, x.options());
  with_rows(mask, values, scales, offsets, x.scalar_type(), columns, [&](auto kind, auto write) {
    const int64_t threads = x.numel() * rows < SMALL ? 1 : at::get_num_threads(), share = (rows + threads - 1) / threads;
    at::parallel_for(0, rows, share, [&](int64_t begin, int64_t last) {
      const at::AutoDispatchBelowADInplaceOrView guard;  // threads do not inherit the inference mode
      const at::Tensor tile = at::empty({std::min(TILE, last - begin), columns}, x.options());
      for (int64_t r = begin; r < last; r += TILE) {
        const int64_t count = std::min(TILE, last - r);
        write(r, r + count, tile.mutable_data_ptr<typename decltype(kind)::A>());
        at::Tensor part = out.narrow(1, r, count);
        const at::Tensor dense = tile.narrow(0, 0, count).t();
        bias ? at::addmm_out(part, bias->narrow(0, r, count), x, dense) : at::mm_out(part, x, dense);
      }
    });
  });
  return out;
}

// what torch.compile knows of a product: the shape, which may be symbolic
at::Tensor shaped_like(const at::Tensor& x, const c10::SymInt& rows) {
  auto sizes = x.sym_sizes().vec();
  sizes.back() = rows;
  return at::empty_symint(sizes, x.options());
}

at::Tensor product_shape(const at::Tensor& mask, const at::Tensor&, const Optional&, const at::Tensor&, const at::Tensor& x,
                         const Optional&) {
  return shaped_like(x, mask.sym_size(0));
}

at::Tensor dense_shape(const at::Tensor& weight, const at::Tensor& x, const Optional&) {
  return shaped_like(x, weight.sym_size(0));
}

}  // namespace

TORCH_LIBRARY(TORCH_EXTENSION_NAME, library) {
  library.def("product(Tensor mask, Tensor values, Tensor? scales, Tensor offsets, Tensor x, Tensor? bias) -> Tensor");
  library.def("prefill(Tensor mask, Tensor values, Tensor? scales, Tensor offsets, Tensor x, Tensor? bias) -> Tensor");
  library.def("dense(Tensor weight, Tensor x, Tensor? bias) -> Tensor");
  library.def("expand(Tensor mask, Tensor values, Tensor? scales, Tensor offsets, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, library) {
  library.impl("product", &product);
  library.impl("prefill", &prefill);
  library.impl("dense", &dense);
  library.impl("expand", &expand);
}

TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, Meta, library) {
  library.impl("product", &product_shape);
  library.impl("prefill", &product_shape);
  library.impl("dense", &dense_shape);
  library.impl("expand", [](const at::Tensor&, const at::Tensor&, const Optional&, const at::Tensor&, at::Tensor) {});
}

// callers see to it that nothing needs a gradient
TORCH_LIBRARY_IMPL(TORCH_EXTENSION_NAME, Autograd, library) {
  for (const char* name : {"product", "prefill", "dense", "expand"}) library.impl(name, torch::CppFunction::makeFallthrough());
}
