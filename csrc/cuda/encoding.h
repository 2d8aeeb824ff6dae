// What all operations need of MLX's arrays and of its encoder.
#pragma once

#include <initializer_list>

#include "cuda/kernels.h"
#include "cuda/packing.h"
#include "mlx/backend/cuda/device.h"
#include "mlx/mlx.h"

namespace mlx_fused_optim::cuda {

namespace mx = mlx::core;

inline Type type_of(mx::Dtype dtype) {
  return dtype == mx::float32 ? Type::float32
      : dtype == mx::float16  ? Type::float16
                              : Type::bfloat16;
}

/// The array; of a contiguous one, from element `begin` on.
inline Source source(const mx::array& a, size_t begin = 0) {
  return {
      mx::gpu_ptr<char>(a) + begin * a.itemsize(),
      type_of(a.dtype()),
      a.flags().row_contiguous,
      a.strides().data()};
}

/// Null where there is no array.
template <typename T>
T* pointer(mx::array* a) {
  return a ? mx::gpu_ptr<T>(*a) : nullptr;
}
template <typename T>
const T* pointer(const mx::array* a) {
  return a ? mx::gpu_ptr<T>(*a) : nullptr;
}

/// Names `count` arrays as inputs of what is launched next: the encoder orders kernels
/// by the buffers that they name. Many parameters are views of one arena: named once.
void set_inputs(mx::cu::CommandEncoder& encoder, const mx::array* arrays, size_t count);

/// Likewise the arrays that are there.
void set_inputs(mx::cu::CommandEncoder& encoder, std::initializer_list<const mx::array*> arrays);
void set_outputs(mx::cu::CommandEncoder& encoder, std::initializer_list<const mx::array*> arrays);

/// Launches a kernel whose one argument is this struct.
template <typename Arguments>
void launch(
    mx::cu::CommandEncoder& encoder,
    CUfunction kernel,
    uint32_t blocks,
    uint32_t threads,
    Arguments& arguments) {
  void* pointers[] = {&arguments};
  encoder.add_kernel_node_raw(kernel, dim3(blocks), dim3(threads), dim3(), 0, pointers);
}

/// A kernel for each batch; compiled and loaded, or an error now.
template <typename T>
std::vector<CUfunction> kernels_for(const BatchList<T>& batches, Variant variant, int device) {
  std::vector<CUfunction> kernels;
  for (auto& batch : batches) {
    variant.capacity = capacity_for<T>(batch->arguments.common.count);
    kernels.push_back(kernel(variant, device));
  }
  return kernels;
}

/// Batch after batch with the same `common` but for its count; `after` is called once
/// each is launched.
template <typename T, typename After>
void launch_batches(
    mx::cu::CommandEncoder& encoder,
    const std::vector<CUfunction>& kernels,
    uint32_t threads,
    const BatchList<T>& batches,
    typename T::Shared& common,
    After after) {
  for (size_t i = 0; i < batches.size(); ++i) {
    auto& arguments = batches[i]->arguments; // as much of it is read as the kernel declares
    common.count = arguments.common.count;
    arguments.common = common;
    launch(encoder, kernels[i], batches[i]->blocks, threads, arguments);
    after();
  }
}

/// Calls `launch_all`, which makes `launches` launches that write disjoint memory: the
/// encoder would put them in line.
template <typename LaunchAll>
void side_by_side(mx::cu::CommandEncoder& encoder, size_t launches, LaunchAll launch_all) {
  if (launches > 1) {
    auto concurrent = encoder.concurrent_context();
    launch_all();
  } else {
    launch_all();
  }
}

/// Whether everything that was launched on the stream is done, and nothing waits to be.
bool has_nothing_to_do(mx::cu::CommandEncoder& encoder);

/// Launches what waits, if it is much and the device has nothing to do: it works while the
/// host goes on. Of a step that reads `elements` in all.
void start_if_idle(mx::cu::CommandEncoder& encoder, size_t elements);

} // namespace mlx_fused_optim::cuda
