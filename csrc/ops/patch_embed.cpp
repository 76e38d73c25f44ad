// fastmllm::patch_embed on the CPU: pack the pixels into patch rows here, leave the matrix product to torch.
#include "../patch_embed.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
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

// Split [0, images * patches) over the threads; call f(image, first, last) for each image's share.
template <typename F> void for_patches(int64_t images, int64_t patches, const F &f) {
  torch::stable::parallel_for(0, images * patches, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / patches;
      const int64_t stop = std::min(end, (image + 1) * patches);
      f(image, begin - image * patches, stop - image * patches);
      begin = stop;
    }
  });
}

template <typename T> T *data(const Tensor &x) {
  return static_cast<T *>(x.data_ptr());
}

template <typename T> Tensor pack(const Tensor &pixels, ScalarType dtype, int64_t patch) {
  const int64_t images = pixels.size(0), length = pixels.size(2) * pixels.size(3), run = patch * pixels.size(3);
  const int64_t patches = (pixels.size(1) / patch) * (pixels.size(2) / patch), k = patch * run;
  Tensor rows = torch::stable::new_empty(pixels, {images * patches, k}, dtype);
  const auto *source = data<uint8_t>(pixels);
  for_patches(images, patches, [&](int64_t image, int64_t first, int64_t last) {
    fastmllm::pack_patches(source + image * pixels.size(1) * length, data<T>(rows) + (image * patches + first) * k,
                           first, last, length, patch, run);
  });
  return rows;
}

Tensor copy(const Tensor &pixels, int64_t patch) {
  const int64_t bytes = pixels.element_size();
  const int64_t images = pixels.size(0), length = pixels.size(2) * pixels.size(3), run = patch * pixels.size(3);
  const int64_t patches = (pixels.size(1) / patch) * (pixels.size(2) / patch), k = patch * run;
  Tensor rows = torch::stable::new_empty(pixels, {images * patches, k});
  const auto *source = data<char>(pixels);
  for_patches(images, patches, [&](int64_t image, int64_t first, int64_t last) {
    fastmllm::copy_patches(source + image * pixels.size(1) * length * bytes,
                           data<char>(rows) + (image * patches + first) * k * bytes, first, last, length * bytes, patch,
                           run * bytes);
  });
  return rows;
}

template <typename S, typename T>
void add_offsets(const std::optional<Tensor> &bias, const std::optional<Tensor> &position, ScalarType sum_dtype,
                 ScalarType dtype, Tensor &out) {
  const int64_t images = out.size(0), patches = out.size(1), width = out.size(2);
  const std::optional<Tensor> b = bias ? std::optional(as(*bias, sum_dtype)) : std::nullopt;
  const std::optional<Tensor> p = position ? std::optional(as(*position, dtype)) : std::nullopt;
  for_patches(images, patches, [&](int64_t image, int64_t first, int64_t last) {
    fastmllm::add_offsets(b ? data<S>(*b) : nullptr, p ? data<T>(*p) : nullptr, data<T>(out) + image * patches * width,
                          first, last, width);
  });
}

// rows (M, K) times weight (K, D), plus bias
Tensor linear(const Tensor &rows, const Tensor &weight, const std::optional<Tensor> &bias) {
  const Tensor transposed = torch::stable::transpose(weight, 0, 1);
  const std::optional<Tensor> b = bias ? std::optional(as(*bias, ScalarType::Float)) : std::nullopt;
  AtenTensorHandle added = b ? b->get() : nullptr, out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(rows.get(), transposed.get(), b ? &added : nullptr, "none",
                                                          nullptr, 0, nullptr, &out));
  return Tensor(out);
}

Tensor patch_embed(const Tensor &pixels_in, const Tensor &weight_in, const std::optional<Tensor> &bias,
                   const std::optional<Tensor> &position, int64_t patch) {
  const ScalarType dtype = weight_in.scalar_type();
  const Tensor weight = torch::stable::contiguous(weight_in);
  const bool is_uint8 = pixels_in.scalar_type() == ScalarType::Byte;
  const Tensor pixels = is_uint8 ? torch::stable::contiguous(pixels_in) : as(pixels_in, dtype);
  Tensor rows = !is_uint8                       ? copy(pixels, patch)
                : dtype == ScalarType::Double   ? pack<double>(pixels, dtype, patch)
                : dtype == ScalarType::BFloat16 ? pack<fastmllm::bfloat16>(pixels, dtype, patch)
                                                : pack<float>(pixels, ScalarType::Float, patch);
  rows = torch::stable::to(rows, dtype); // fp16 only: eight bits fit, so nothing is lost

  const int64_t patches = (pixels.size(1) / patch) * (pixels.size(2) / patch), width = weight.size(1);
  const std::vector<int64_t> shape = {pixels.size(0), patches, width};
  if (dtype == ScalarType::Float && &aoti_torch_cpu__linear_pointwise && rows.numel() * width >= kOneDnn) {
    Tensor out = torch::stable::view(linear(rows, weight, bias), shape);
    if (position) {
      const Tensor p = as(*position, dtype);
      for_patches(shape[0], patches, [&](int64_t image, int64_t first, int64_t last) {
        fastmllm::add_positions(data<float>(p), data<float>(out) + image * patches * width, first, last, width);
      });
    }
    return out;
  }

  const bool has_offset = bias || position, half = dtype == ScalarType::Half;
  Tensor out = torch::stable::new_empty(weight, shape, half ? ScalarType::Float : dtype);
  if (has_offset) {
    if (dtype == ScalarType::Double)
      add_offsets<double, double>(bias, position, dtype, dtype, out);
    else if (dtype == ScalarType::BFloat16)
      add_offsets<float, fastmllm::bfloat16>(bias, position, ScalarType::Float, dtype, out);
    else
      add_offsets<float, float>(bias, position, ScalarType::Float, ScalarType::Float, out);
  }
  out = torch::stable::to(out, dtype);
  const Tensor flat = torch::stable::view(out, {rows.size(0), width});
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(flat.get(), flat.get(), rows.get(), weight.get(), has_offset ? 1.0 : 0.0, 1.0));
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmllm, CPU, m) {
  m.impl("patch_embed", TORCH_BOX(&patch_embed));
}
