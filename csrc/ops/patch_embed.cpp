// fastmllm::patch_embed and its backward on the CPU: pixels become patch rows here, the matrix product is torch's.
#include "../patch_embed.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

// oneDNN's fp32 product is twice as fast as MKL's on AMD (AVX-512 against AVX2); weak, for a torch without oneDNN.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle *bias, const char *activation, const double **scalars,
    int64_t num_scalars, const char **algorithm, AtenTensorHandle *out);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32;       // patches a task
constexpr int64_t kOneDnn = 1 << 21; // multiplications from which its set-up is paid for

Tensor as(const Tensor &x, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(x, dtype));
}

template <typename T> T *data(const Tensor &x) {
  return static_cast<T *>(x.data_ptr());
}

// Segments are the images of a dense batch, or the frames of a packed one (`grids`, see kernels/_grids.py).
struct Geometry {
  int64_t patch, channels, frames, merge;
  bool planar, packed;
  std::vector<int64_t> starts, heights, widths; // first patch (and one behind the last), rows and columns of patches
  std::vector<double> scale, shift;             // one value a channel

  Geometry(const Tensor &pixels, const std::optional<Tensor> &grids, int64_t patch, int64_t frames, int64_t merge,
           bool planar, std::vector<double> scale, std::vector<double> shift)
      : patch(patch), channels(int64_t(scale.size())), frames(frames), merge(merge), planar(planar),
        packed(grids.has_value()), starts{0}, scale(std::move(scale)), shift(std::move(shift)) {
    const Tensor table = grids ? torch::stable::contiguous(*grids) : pixels;
    const int64_t segments = grids ? table.size(1) - 1 : pixels.size(0);
    for (int64_t s = 0; s < segments; ++s) {
      const int32_t *column = grids ? data<int32_t>(table) + s : nullptr;
      heights.push_back(grids ? column[segments + 1] : pixels.size(planar ? 2 : 1) / patch);
      widths.push_back(grids ? column[2 * (segments + 1)] : pixels.size(planar ? 3 : 2) / patch);
      starts.push_back(starts.back() + heights.back() * widths.back());
    }
  }

  int64_t segments() const { return int64_t(heights.size()); }
  int64_t patches() const { return starts.back(); }
  int64_t values() const { return frames * patch * patch * channels; }

  template <typename T> std::vector<T> affine(const std::vector<double> &given) const {
    std::vector<T> out(planar ? channels : patch * channels); // along a run of pixels
    for (size_t t = 0; t < out.size(); ++t)
      out[t] = T(given[t % channels]);
    return out;
  }

  // Split all patches over the threads; call f(segment, first, last) for each segment's share.
  template <typename F> void for_patches(const F &f) const {
    torch::stable::parallel_for(0, patches(), kGrain, [&](int64_t begin, int64_t end) {
      int64_t s = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
      for (; begin < end; ++s) {
        const int64_t stop = std::min(end, starts[s + 1]);
        if (begin < stop)
          f(s, begin - starts[s], stop - starts[s]);
        begin = std::max(begin, stop);
      }
    });
  }

  // Call whole(offset of the image, first row, first, last) where patches lie in the order of their rows, else
  // part(offset of a frame, row in values, place) and, if planar, part(offset of its patch, row in values, plane).
  template <typename Whole, typename Part>
  void walk(int64_t s, int64_t first, int64_t last, const Whole &whole, const Part &part) const {
    const int64_t image = starts[s] * values(), w = widths[s], area = heights[s] * w, m = merge;
    if (frames == 1 && merge == 1 && !planar)
      return whole(image, starts[s] + first, first, last);
    for (int64_t p = first; p < last; ++p) {
      const int64_t block = p / (m * m), inside = p % (m * m), across = w / m;
      const int64_t line = block / across * m + inside / m, column = block % across * m + inside % m;
      for (int64_t f = 0; f < frames; ++f) {
        const int64_t frame = image + f * area * patch * patch * channels;
        const int64_t row = ((starts[s] + p) * frames + f) * patch * patch * channels;
        if (planar)
          part(frame + (line * patch * w + column) * patch, row, area * patch * patch);
        else
          part(frame, row, line * w + column);
      }
    }
  }
};

template <typename From, typename To, typename Sum>
Tensor pack(const Tensor &pixels, const Geometry &g, ScalarType dtype) {
  const Tensor rows = torch::stable::new_empty(pixels, {g.patches(), g.values()}, dtype);
  const std::vector<Sum> scale = g.affine<Sum>(g.scale), shift = g.affine<Sum>(g.shift);
  const int64_t run = g.patch * g.channels;
  const From *x = data<From>(pixels);
  To *y = data<To>(rows);
  g.for_patches([&](int64_t s, int64_t first, int64_t last) {
    const int64_t w = g.widths[s];
    g.walk(
        s, first, last,
        [&](int64_t image, int64_t row, int64_t begin, int64_t end) {
          fastmllm::pack_patches(x + image, y + row * g.values(), scale.data(), shift.data(), begin, end, w * run,
                                 g.patch, run);
        },
        [&](int64_t image, int64_t row, int64_t place) {
          if (g.planar)
            fastmllm::pack_planar(x + image, y + row, scale.data(), shift.data(), place, w * g.patch, g.patch,
                                  g.channels);
          else
            fastmllm::pack_patches(x + image, y + row, scale.data(), shift.data(), place, place + 1, w * run, g.patch,
                                   run);
        });
  });
  return rows;
}

// The normalised patches (M, K) in `dtype`.
Tensor patch_rows(const Tensor &pixels_in, const Geometry &g, ScalarType dtype) {
  using fastmllm::bfloat16;
  const bool is_double = dtype == ScalarType::Double, is_bf16 = dtype == ScalarType::BFloat16;
  if (pixels_in.scalar_type() == ScalarType::Byte) {
    const Tensor pixels = torch::stable::contiguous(pixels_in);
    if (is_double)
      return pack<uint8_t, double, double>(pixels, g, dtype);
    if (is_bf16)
      return pack<uint8_t, bfloat16, float>(pixels, g, dtype);
    return torch::stable::to(pack<uint8_t, float, float>(pixels, g, ScalarType::Float), dtype);
  }
  const Tensor pixels = as(pixels_in, is_double ? dtype : ScalarType::Float);
  if (is_double)
    return pack<double, double, double>(pixels, g, dtype);
  if (is_bf16)
    return pack<float, bfloat16, float>(pixels, g, dtype);
  return torch::stable::to(pack<float, float, float>(pixels, g, ScalarType::Float), dtype);
}

template <typename T> Tensor unpack(const Tensor &rows_in, const Tensor &pixels, const Geometry &g, ScalarType dtype) {
  const Tensor rows = as(rows_in, dtype);
  const Tensor out = torch::stable::new_empty(rows, {pixels.numel()}, dtype);
  const std::vector<T> scale = g.affine<T>(g.scale);
  const int64_t run = g.patch * g.channels;
  const T *x = data<T>(rows);
  T *y = data<T>(out);
  g.for_patches([&](int64_t s, int64_t first, int64_t last) {
    const int64_t w = g.widths[s];
    g.walk(
        s, first, last,
        [&](int64_t image, int64_t row, int64_t begin, int64_t end) {
          fastmllm::unpack_patches(x + row * g.values(), y + image, scale.data(), begin, end, w * run, g.patch, run);
        },
        [&](int64_t image, int64_t row, int64_t place) {
          if (g.planar)
            fastmllm::unpack_planar(x + row, y + image, scale.data(), place, w * g.patch, g.patch, g.channels);
          else
            fastmllm::unpack_patches(x + row, y + image, scale.data(), place, place + 1, w * run, g.patch, run);
        });
  });
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < pixels.dim(); ++i)
    shape.push_back(pixels.size(i));
  return torch::stable::view(torch::stable::to(out, pixels.scalar_type()), shape);
}

// The rows of the positions that a segment reads: a dense batch shares them.
int64_t position_row(const Geometry &g, int64_t s) {
  return g.packed ? g.starts[s] : 0;
}

template <typename T, typename Sum>
void add_offsets(const std::optional<Tensor> &bias, const std::optional<Tensor> &position, const Geometry &g,
                 ScalarType sum_dtype, const Tensor &out) {
  const int64_t width = out.size(1);
  const std::optional<Tensor> b = bias ? std::optional(as(*bias, sum_dtype)) : std::nullopt;
  const std::optional<Tensor> p = position ? std::optional(as(*position, out.scalar_type())) : std::nullopt;
  g.for_patches([&](int64_t s, int64_t first, int64_t last) {
    fastmllm::add_offsets(b ? data<Sum>(*b) : nullptr, p ? data<T>(*p) + position_row(g, s) * width : nullptr,
                          data<T>(out) + g.starts[s] * width, first, last, width);
  });
}

bool use_onednn(const Tensor &a, int64_t columns) {
  return a.scalar_type() == ScalarType::Float && &aoti_torch_cpu__linear_pointwise && a.numel() * columns >= kOneDnn;
}

// a (M, K) times b (K, N), plus a bias (N,) in fp32
Tensor onednn(const Tensor &a, const Tensor &b, const std::optional<Tensor> &bias) {
  const Tensor transposed = torch::stable::transpose(b, 0, 1);
  AtenTensorHandle added = bias ? bias->get() : nullptr, out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(a.get(), transposed.get(), bias ? &added : nullptr, "none",
                                                          nullptr, 0, nullptr, &out));
  return Tensor(out);
}

Tensor multiply(const Tensor &a, const Tensor &b) {
  return use_onednn(a, b.size(1)) ? onednn(a, b, std::nullopt) : torch::stable::matmul(a, b);
}

// The patches (M, K) times weight plus offsets, (M, D)
Tensor project(const Tensor &rows, const Tensor &weight, const std::optional<Tensor> &bias,
               const std::optional<Tensor> &position, const Geometry &g) {
  const ScalarType dtype = weight.scalar_type();
  const int64_t width = weight.size(1);
  if (use_onednn(rows, width)) {
    const std::optional<Tensor> b = bias ? std::optional(as(*bias, dtype)) : std::nullopt;
    const Tensor out = onednn(rows, weight, b);
    if (position) {
      const Tensor p = as(*position, dtype);
      g.for_patches([&](int64_t s, int64_t first, int64_t last) {
        fastmllm::add_positions(data<float>(p) + position_row(g, s) * width, data<float>(out) + g.starts[s] * width,
                                first, last, width);
      });
    }
    return out;
  }
  const bool has_offset = bias || position;
  Tensor out =
      torch::stable::new_empty(weight, {g.patches(), width}, dtype == ScalarType::Half ? ScalarType::Float : dtype);
  if (has_offset) {
    if (dtype == ScalarType::Double)
      add_offsets<double, double>(bias, position, g, dtype, out);
    else if (dtype == ScalarType::BFloat16)
      add_offsets<fastmllm::bfloat16, float>(bias, position, g, ScalarType::Float, out);
    else
      add_offsets<float, float>(bias, position, g, ScalarType::Float, out);
  }
  out = torch::stable::to(out, dtype);
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), rows.get(), weight.get(), has_offset ? 1.0 : 0.0, 1.0));
  return out;
}

// Copy patches (M, D) to or from tokens that have `prefix` more rows before each segment, in bytes a row.
void move_patches(const char *from, char *to, const Geometry &g, int64_t prefix, int64_t bytes, bool into_tokens) {
  g.for_patches([&](int64_t s, int64_t first, int64_t last) {
    const int64_t patch = g.starts[s] + first, token = patch + (s + 1) * prefix;
    std::memcpy(to + (into_tokens ? token : patch) * bytes, from + (into_tokens ? patch : token) * bytes,
                (last - first) * bytes);
  });
}

Tensor patch_embed(const Tensor &pixels, const Tensor &weight_in, const std::optional<Tensor> &bias,
                   const std::optional<Tensor> &position, const std::optional<Tensor> &prefix_in,
                   const std::optional<Tensor> &grids, int64_t patch, int64_t frames, int64_t merge, bool planar,
                   std::vector<double> scale, std::vector<double> shift) {
  const Geometry g(pixels, grids, patch, frames, merge, planar, std::move(scale), std::move(shift));
  const Tensor weight = torch::stable::contiguous(weight_in);
  const int64_t width = weight.size(1), count = g.segments(), prefix_rows = prefix_in ? prefix_in->size(0) : 0;
  const int64_t n = g.packed ? 0 : (pixels.size(planar ? 2 : 1) / patch) * (pixels.size(planar ? 3 : 2) / patch);
  const std::vector<int64_t> shape = g.packed ? std::vector<int64_t>{g.patches() + count * prefix_rows, width}
                                              : std::vector<int64_t>{count, n + prefix_rows, width};
  const Tensor tokens = project(patch_rows(pixels, g, weight.scalar_type()), weight, bias, position, g);
  if (!prefix_in)
    return torch::stable::view(tokens, shape);
  const Tensor prefix = as(*prefix_in, weight.scalar_type()), out = torch::stable::new_empty(weight, shape);
  const int64_t bytes = width * weight.element_size();
  for (int64_t s = 0; s < count; ++s)
    std::memcpy(data<char>(out) + (g.starts[s] + s * prefix_rows) * bytes, data<char>(prefix), prefix_rows * bytes);
  move_patches(data<char>(tokens), data<char>(out), g, prefix_rows, bytes, true);
  return out;
}

std::tuple<Tensor, Tensor> patch_embed_bwd(const Tensor &grad_in, const Tensor &pixels, const Tensor &weight_in,
                                           int64_t patch, bool pixel_grad, bool weight_grad,
                                           const std::optional<Tensor> &grids, int64_t prefix_rows, int64_t frames,
                                           int64_t merge, bool planar, std::vector<double> scale,
                                           std::vector<double> shift) {
  const Geometry g(pixels, grids, patch, frames, merge, planar, std::move(scale), std::move(shift));
  const ScalarType dtype = weight_in.scalar_type();
  const Tensor weight = torch::stable::contiguous(weight_in), tokens = as(grad_in, dtype);
  const std::vector<int64_t> shape = {g.patches(), weight.size(1)};
  Tensor grad = prefix_rows ? torch::stable::new_empty(weight, shape) : torch::stable::view(tokens, shape);
  if (prefix_rows)
    move_patches(data<char>(tokens), data<char>(grad), g, prefix_rows, weight.size(1) * weight.element_size(), false);
  Tensor dx = torch::stable::new_empty(pixels, {int64_t(0)}), dw = torch::stable::new_empty(weight, {int64_t(0)});
  if (pixel_grad) {
    const Tensor rows = multiply(grad, torch::stable::transpose(weight, 0, 1));
    dx = dtype == ScalarType::Double ? unpack<double>(rows, pixels, g, dtype)
                                     : unpack<float>(rows, pixels, g, ScalarType::Float);
  }
  if (weight_grad)
    dw = torch::stable::contiguous(multiply(torch::stable::transpose(patch_rows(pixels, g, dtype), 0, 1), grad));
  return {dx, dw};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmllm, CPU, m) {
  m.impl("patch_embed", TORCH_BOX(&patch_embed));
  m.impl("patch_embed_bwd", TORCH_BOX(&patch_embed_bwd));
}
