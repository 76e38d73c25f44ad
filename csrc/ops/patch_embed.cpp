// fastmllm::patch_embed and its backward on the CPU: pixels become patch rows here, the matrix product is torch's.
#include "../patch_embed.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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

struct Geometry {
  int64_t images, image_size, row_length, patches, patch, run;
  std::vector<double> scale, shift; // one value a channel

  Geometry(const Tensor &pixels, int64_t patch, std::vector<double> scale, std::vector<double> shift)
      : images(pixels.size(0)), image_size(pixels.size(1) * pixels.size(2) * pixels.size(3)),
        row_length(pixels.size(2) * pixels.size(3)), patches((pixels.size(1) / patch) * (pixels.size(2) / patch)),
        patch(patch), run(patch * pixels.size(3)), scale(std::move(scale)), shift(std::move(shift)) {}

  template <typename T> std::vector<T> along_run(const std::vector<double> &channels) const {
    std::vector<T> values(run);
    for (int64_t t = 0; t < run; ++t)
      values[t] = T(channels[t % channels.size()]);
    return values;
  }

  // Split [0, images * patches) over the threads; call f(image, first, last) for each image's share.
  template <typename F> void for_patches(const F &f) const {
    torch::stable::parallel_for(0, images * patches, kGrain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t image = begin / patches, stop = std::min(end, (image + 1) * patches);
        f(image, begin - image * patches, stop - image * patches);
        begin = stop;
      }
    });
  }
};

template <typename From, typename To, typename Sum>
Tensor pack(const Tensor &pixels, const Geometry &g, ScalarType dtype) {
  const int64_t k = g.patch * g.run;
  const Tensor rows = torch::stable::new_empty(pixels, {g.images * g.patches, k}, dtype);
  const std::vector<Sum> scale = g.along_run<Sum>(g.scale), shift = g.along_run<Sum>(g.shift);
  g.for_patches([&](int64_t image, int64_t first, int64_t last) {
    fastmllm::pack_patches(data<From>(pixels) + image * g.image_size, data<To>(rows) + (image * g.patches + first) * k,
                           scale.data(), shift.data(), first, last, g.row_length, g.patch, g.run);
  });
  return rows;
}

// The normalised patches (I * N, K) in `dtype`.
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
  const Tensor out =
      torch::stable::new_empty(rows, {pixels.size(0), pixels.size(1), pixels.size(2), pixels.size(3)}, dtype);
  const std::vector<T> scale = g.along_run<T>(g.scale);
  g.for_patches([&](int64_t image, int64_t first, int64_t last) {
    fastmllm::unpack_patches(data<T>(rows) + (image * g.patches + first) * g.patch * g.run,
                             data<T>(out) + image * g.image_size, scale.data(), first, last, g.row_length, g.patch,
                             g.run);
  });
  return torch::stable::to(out, pixels.scalar_type());
}

template <typename T, typename Sum>
void add_offsets(const std::optional<Tensor> &bias, const std::optional<Tensor> &position, const Geometry &g,
                 ScalarType sum_dtype, const Tensor &out) {
  const int64_t width = out.size(2);
  const std::optional<Tensor> b = bias ? std::optional(as(*bias, sum_dtype)) : std::nullopt;
  const std::optional<Tensor> p = position ? std::optional(as(*position, out.scalar_type())) : std::nullopt;
  g.for_patches([&](int64_t image, int64_t first, int64_t last) {
    fastmllm::add_offsets(b ? data<Sum>(*b) : nullptr, p ? data<T>(*p) : nullptr,
                          data<T>(out) + image * g.patches * width, first, last, width);
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

Tensor patch_embed(const Tensor &pixels, const Tensor &weight_in, const std::optional<Tensor> &bias,
                   const std::optional<Tensor> &position, int64_t patch, std::vector<double> scale,
                   std::vector<double> shift) {
  const Geometry g(pixels, patch, std::move(scale), std::move(shift));
  const ScalarType dtype = weight_in.scalar_type();
  const Tensor weight = torch::stable::contiguous(weight_in), rows = patch_rows(pixels, g, dtype);
  const int64_t width = weight.size(1);
  const std::vector<int64_t> shape = {g.images, g.patches, width};
  if (use_onednn(rows, width)) {
    const std::optional<Tensor> b = bias ? std::optional(as(*bias, dtype)) : std::nullopt;
    const Tensor out = torch::stable::view(onednn(rows, weight, b), shape);
    if (position) {
      const Tensor p = as(*position, dtype);
      g.for_patches([&](int64_t image, int64_t first, int64_t last) {
        fastmllm::add_positions(data<float>(p), data<float>(out) + image * g.patches * width, first, last, width);
      });
    }
    return out;
  }
  const bool has_offset = bias || position;
  Tensor out = torch::stable::new_empty(weight, shape, dtype == ScalarType::Half ? ScalarType::Float : dtype);
  if (has_offset) {
    if (dtype == ScalarType::Double)
      add_offsets<double, double>(bias, position, g, dtype, out);
    else if (dtype == ScalarType::BFloat16)
      add_offsets<fastmllm::bfloat16, float>(bias, position, g, ScalarType::Float, out);
    else
      add_offsets<float, float>(bias, position, g, ScalarType::Float, out);
  }
  out = torch::stable::to(out, dtype);
  const Tensor flat = torch::stable::view(out, {g.images * g.patches, width});
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(flat.get(), flat.get(), rows.get(), weight.get(), has_offset ? 1.0 : 0.0, 1.0));
  return out;
}

std::tuple<Tensor, Tensor> patch_embed_bwd(const Tensor &grad_in, const Tensor &pixels, const Tensor &weight_in,
                                           int64_t patch, bool pixel_grad, bool weight_grad, std::vector<double> scale,
                                           std::vector<double> shift) {
  const Geometry g(pixels, patch, std::move(scale), std::move(shift));
  const ScalarType dtype = weight_in.scalar_type();
  const Tensor weight = torch::stable::contiguous(weight_in);
  const Tensor grad =
      torch::stable::view(torch::stable::contiguous(grad_in), {g.images * g.patches, weight.size(1)}); // (I * N, D)
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
