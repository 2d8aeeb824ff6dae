// What all operations need of MLX's arrays and of its encoder.
#pragma once

#include <initializer_list>
#include <optional>

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

/// The launches of one node, which write disjoint memory. Where nothing waits in the encoder they
/// go straight to the stream: behind what was committed, before what is encoded later, and without
/// a graph that costs the host an update and a launch. Else they join what waits, side by side.
class Submission {
 public:
  Submission(mx::cu::CommandEncoder& encoder, size_t launches);

  /// Names what the launches read and write: the encoder orders kernels by their buffers, and
  /// counts elements. Of neighbours in one buffer one is enough: many parameters are views.
  void reads(const mx::array* arrays, size_t count);
  void reads(std::initializer_list<const mx::array*> arrays); // those that are there
  void writes(std::initializer_list<const mx::array*> arrays);

  /// Launches a kernel whose one argument is this struct.
  template <typename Arguments>
  void launch(CUfunction kernel, uint32_t blocks, uint32_t threads, Arguments& arguments) {
    void* pointers[] = {&arguments};
    launch(kernel, blocks, threads, pointers);
  }

 private:
  void launch(CUfunction kernel, uint32_t blocks, uint32_t threads, void** arguments);

  mx::cu::CommandEncoder& encoder_;
  bool is_direct_;
  std::optional<mx::cu::CommandEncoder::ConcurrentContext> side_by_side_;
};

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
    Submission& submission,
    const std::vector<CUfunction>& kernels,
    uint32_t threads,
    const BatchList<T>& batches,
    typename T::Shared& common,
    After after) {
  for (size_t i = 0; i < batches.size(); ++i) {
    auto& arguments = batches[i]->arguments; // as much of it is read as the kernel declares
    common.count = arguments.common.count;
    arguments.common = common;
    submission.launch(kernels[i], batches[i]->blocks, threads, arguments);
    after();
  }
}

/// Whether the stream is idle and nothing is uncommitted: only completion handlers of MLX may be
/// left.
bool has_nothing_to_do(mx::cu::CommandEncoder& encoder);

/// What waits in the graph begins, if it is worth it and the device has nothing to do: it works
/// while the host goes on.
void start_if_idle(mx::cu::CommandEncoder& encoder);

} // namespace mlx_fused_optim::cuda
