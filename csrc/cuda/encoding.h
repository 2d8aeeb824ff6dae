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

/// Launches of kernels that write disjoint memory, and what they read and write: the encoder
/// orders kernels by that.
///
/// MLX collects kernels in a CUDA graph, which is made, compared with an earlier one and
/// launched when something waits for it. Where nothing has been collected, one kernel alone
/// goes to the stream at once: the device starts earlier, and the graph's cost is saved. What
/// is collected later comes after it, as it is in the stream then.
class Submission {
 public:
  Submission(mx::cu::CommandEncoder& encoder, size_t launches);

  /// Many parameters are views of one arena, which is named once.
  void reads(const mx::array* arrays, size_t count);
  /// Those that are there.
  void reads(std::initializer_list<const mx::array*> arrays);
  void writes(std::initializer_list<const mx::array*> arrays);

  /// A kernel whose one argument is this struct.
  template <typename Arguments>
  void launch(CUfunction kernel, uint32_t blocks, uint32_t threads, Arguments& arguments) {
    void* pointers[] = {&arguments};
    launch(kernel, blocks, threads, pointers);
  }

  bool is_direct() const { return is_direct_; }

 private:
  void launch(CUfunction kernel, uint32_t blocks, uint32_t threads, void** arguments);

  mx::cu::CommandEncoder& encoder_;
  bool is_direct_;
  // The encoder would put several in line.
  std::optional<mx::cu::CommandEncoder::ConcurrentContext> side_by_side_;
};

/// The kernels of one kind: for any number of tensors, and for kFew of them if there is one.
struct KernelPair {
  KernelPair(CUfunction any) : KernelPair(any, any) {}
  KernelPair(CUfunction many, CUfunction few) : many(many), few(few) {}
  CUfunction many, few;
};

/// Batch after batch with the same `common` but for its count; `after` is called once
/// each is launched.
template <typename T, typename After>
void launch_batches(
    Submission& submission,
    KernelPair kernels,
    uint32_t threads,
    const BatchList<T>& batches,
    typename T::Shared& common,
    After after) {
  for (auto& batch : batches) {
    common.count = batch->arguments.common.count;
    batch->arguments.common = common;
    const auto kernel = common.count <= kFew ? kernels.few : kernels.many;
    submission.launch(kernel, batch->blocks, threads, batch->arguments);
    after();
  }
}

/// Whether everything that was launched on the stream is done.
bool is_idle(mx::cu::CommandEncoder& encoder);

/// Whether that is so, and nothing waits to be launched.
bool has_nothing_to_do(mx::cu::CommandEncoder& encoder);

} // namespace mlx_fused_optim::cuda
