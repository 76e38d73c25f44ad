// fastmllm::insert_features on CUDA, forward and backward. Stable ABI: compiles without a CUDA torch, see
// build_cuda.py.
//
// index_copy copies all T rows and then F of them again. Here a map row -> feature (or -1) is made first, so every row
// is read once and written once: the operator moves 2 T rows instead of 2 T + 2 F, and most rows are images'.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#ifndef USE_CUDA
#error "define USE_CUDA: torch declares its current stream only then"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;

__global__ void map_rows(const int64_t *__restrict__ index, int64_t features, int64_t tokens, int *__restrict__ map) {
  const int64_t f = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (f >= features)
    return;
  if (index[f] < 0 || index[f] >= tokens)
    __trap(); // an index out of range, as index_copy asserts
  map[index[f]] = int(f);
}

// One block a row of `length` words V.
template <typename V>
__global__ void insert_rows(const V *__restrict__ embeddings, const V *__restrict__ features,
                            const int *__restrict__ map, V *__restrict__ out, int length) {
  const int64_t row = blockIdx.x;
  const int feature = map[row];
  const V *source = feature < 0 ? embeddings + row * length : features + int64_t(feature) * length;
  for (int i = threadIdx.x; i < length; i += blockDim.x)
    out[row * length + i] = source[i];
}

template <typename V>
__global__ void split_rows(const V *__restrict__ grad, const int *__restrict__ map, V *__restrict__ embeddings,
                           V *__restrict__ features, int length) {
  const int64_t row = blockIdx.x;
  const int feature = map[row];
  for (int i = threadIdx.x; i < length; i += blockDim.x) {
    const V value = grad[row * length + i];
    if (feature >= 0)
      features[int64_t(feature) * length + i] = value;
    embeddings[row * length + i] = feature < 0 ? value : V{};
  }
}

template <typename V>
__global__ void gather_rows(const V *__restrict__ grad, const int64_t *__restrict__ index, int64_t tokens,
                            V *__restrict__ features, int length) {
  const int64_t row = blockIdx.x, source = index[row];
  if (source < 0 || source >= tokens)
    __trap();
  for (int i = threadIdx.x; i < length; i += blockDim.x)
    features[row * length + i] = grad[source * length + i];
}

cudaStream_t current_stream(const Tensor &x) {
  void *stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char *op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

// Call f with a null pointer of the widest word that divides a row and every address.
template <typename F> void with_words(int64_t row_bytes, std::initializer_list<const void *> addresses, const F &f) {
  uint64_t bits = uint64_t(row_bytes);
  for (const void *address : addresses)
    bits |= reinterpret_cast<uint64_t>(address);
  if (bits % 16 == 0)
    f(static_cast<uint4 *>(nullptr), int(row_bytes / 16));
  else if (bits % 4 == 0)
    f(static_cast<uint32_t *>(nullptr), int(row_bytes / 4));
  else
    f(static_cast<uint16_t *>(nullptr), int(row_bytes / 2)); // the narrowest float is two bytes
}

int threads_for(int length) {
  return std::min(kThreads, (length + 31) / 32 * 32);
}

Tensor make_map(const Tensor &index, int64_t tokens, cudaStream_t stream) {
  Tensor map = torch::stable::new_empty(index, {tokens}, ScalarType::Int);
  cudaMemsetAsync(map.data_ptr(), 0xff, tokens * sizeof(int), stream); // -1
  if (const int64_t features = index.numel())
    map_rows<<<(features + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
        static_cast<const int64_t *>(index.data_ptr()), features, tokens, static_cast<int *>(map.data_ptr()));
  return map;
}

Tensor insert_features(const Tensor &embeddings_in, const Tensor &features_in, const Tensor &index_in) {
  const torch::stable::accelerator::DeviceGuard guard(embeddings_in.get_device_index());
  const Tensor embeddings = torch::stable::contiguous(embeddings_in), features = torch::stable::contiguous(features_in);
  const Tensor index = torch::stable::contiguous(index_in);
  const int64_t tokens = embeddings.size(0), bytes = embeddings.size(1) * embeddings.element_size();
  const Tensor out = torch::stable::new_empty(embeddings, {tokens, embeddings.size(1)});
  if (out.numel() == 0)
    return out;
  const cudaStream_t stream = current_stream(out);
  const Tensor map = make_map(index, tokens, stream);
  with_words(bytes, {embeddings.data_ptr(), features.data_ptr(), out.data_ptr()}, [&](auto *word, int length) {
    using V = std::remove_pointer_t<decltype(word)>;
    insert_rows<V><<<tokens, threads_for(length), 0, stream>>>(
        static_cast<const V *>(embeddings.data_ptr()), static_cast<const V *>(features.data_ptr()),
        static_cast<const int *>(map.data_ptr()), static_cast<V *>(out.data_ptr()), length);
  });
  check_launch("fastmllm::insert_features");
  return out;
}

std::tuple<Tensor, Tensor> insert_features_bwd(const Tensor &grad_in, const Tensor &index_in, bool embedding_grad) {
  const torch::stable::accelerator::DeviceGuard guard(grad_in.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_in), index = torch::stable::contiguous(index_in);
  const int64_t tokens = grad.size(0), width = grad.size(1), count = index.numel();
  const Tensor features = torch::stable::new_empty(grad, {count, width});
  const Tensor embeddings =
      embedding_grad ? torch::stable::new_empty(grad, {tokens, width}) : torch::stable::new_empty(grad, {int64_t(0)});
  if (grad.numel() == 0)
    return {embeddings, features};
  const cudaStream_t stream = current_stream(grad);
  const auto addresses = {static_cast<const void *>(grad.data_ptr()), static_cast<const void *>(features.data_ptr()),
                          static_cast<const void *>(embeddings.data_ptr())};
  with_words(width * grad.element_size(), addresses, [&](auto *word, int length) {
    using V = std::remove_pointer_t<decltype(word)>;
    const auto *source = static_cast<const V *>(grad.data_ptr());
    auto *split = static_cast<V *>(features.data_ptr());
    if (embedding_grad) {
      const Tensor map = make_map(index, tokens, stream);
      split_rows<V><<<tokens, threads_for(length), 0, stream>>>(source, static_cast<const int *>(map.data_ptr()),
                                                                static_cast<V *>(embeddings.data_ptr()), split, length);
    } else if (count) {
      gather_rows<V><<<count, threads_for(length), 0, stream>>>(source, static_cast<const int64_t *>(index.data_ptr()),
                                                                tokens, split, length);
    }
  });
  check_launch("fastmllm::insert_features_bwd");
  return {embeddings, features};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmllm, CUDA, m) {
  m.impl("insert_features", TORCH_BOX(&insert_features));
  m.impl("insert_features_bwd", TORCH_BOX(&insert_features_bwd));
}
