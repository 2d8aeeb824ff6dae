// The measurement of the gradients on a CUDA device: chunks, arrays, all of them.
#include "graph/measure.h"

#include <algorithm>
#include <memory>

#include "cuda/encoding.h"
#include "cuda/measure_batches.h"
#include "cuda/memory.h"
#include "cuda/operations.h"

namespace mlx_fused_optim::cuda {

namespace {

/// Sums on their way; the encoder keeps them until the kernels are done.
mx::array temporary(size_t count, mx::Stream stream) {
  constexpr int kWords = sizeof(Squares) / sizeof(uint32_t);
  mx::array sums({static_cast<int>(std::max<size_t>(count, 1)), kWords}, mx::uint32, nullptr, {});
  sums.set_data(allocate(sums.nbytes(), stream));
  return sums;
}

MeasureBatches sort_arrays(const MeasurePlan& plan, const MeasureInputs& in) {
  MeasureBatches batches;
  for (size_t i = 0; i < plan.array_count(); ++i) {
    auto& a = in.arrays[i];
    batches.add(a.ndim(), a.shape().data(), source(a), i < plan.gradient_count, fills_memory(a));
  }
  return batches;
}

struct MeasureKernels {
  std::vector<CUfunction> dense, sparse; // of each batch
  CUfunction fold, finish;
};

/// Compiled and loaded, or an error now.
MeasureKernels kernels_for(const MeasurePlan& plan, const MeasureBatches& batches, int device) {
  using namespace fused_math;
  auto& control = plan.control;
  Variant dense{Kind::measure_dense};
  dense.gradients = batches.types;
  dense.flags = control.flags & (kGradScale | kClipValue);
  if (control.flags & kGradScale && control.scheduled >> kGradScaleFactor & 1) {
    dense.schedules = parts_of(control);
  }
  Variant sparse = dense;
  sparse.kind = Kind::measure_sparse;
  return {
      kernels_for(batches.dense, dense, device),
      kernels_for(batches.sparse, sparse, device),
      kernel(Variant{Kind::measure_fold}, device),
      kernel(Variant{Kind::measure_finish}, device)};
}

void launch_chunks(
    mx::cu::CommandEncoder& encoder,
    const MeasureKernels& kernels,
    const MeasurePlan& plan,
    const MeasureInputs& in,
    const MeasureBatches& batches,
    mx::array& chunks) {
  Submission submission(encoder, batches.launches());
  submission.reads(in.arrays, plan.array_count());
  submission.reads({in.step, in.given});
  submission.writes({&chunks});
  MeasureCommon common{};
  common.control = plan.control;
  common.step = mx::gpu_ptr<uint64_t>(*in.step);
  common.given = pointer<float>(in.given);
  common.chunks = mx::gpu_ptr<Squares>(chunks);
  auto nothing = [] {};
  launch_batches(submission, kernels.dense, kThreads, batches.dense, common, nothing);
  launch_batches(submission, kernels.sparse, kThreads, batches.sparse, common, nothing);
}

void launch_folds(
    mx::cu::CommandEncoder& encoder,
    CUfunction kernel,
    const MeasurePlan& plan,
    const MeasureBatches& batches,
    const mx::array& chunks,
    mx::array& sums,
    mx::array& measured) {
  auto folds = std::make_unique<FoldLaunch>();
  folds->chunks = mx::gpu_ptr<Squares>(chunks);
  folds->sums = mx::gpu_ptr<Squares>(sums);
  folds->norms =
      plan.has_parameters ? mx::gpu_ptr<float>(measured) + fused_math::kMeasuredTensors : nullptr;
  folds->gradient_count = static_cast<uint32_t>(plan.gradient_count);
  const size_t arrays = batches.arrays();
  Submission submission(encoder, divide_up(arrays, FoldLaunch::kCapacity));
  submission.reads({&chunks});
  submission.writes({&sums, &measured});
  for (size_t first = 0; first < arrays; first += FoldLaunch::kCapacity) {
    const size_t count = std::min<size_t>(arrays - first, FoldLaunch::kCapacity);
    const auto begin = batches.first_chunk.begin() + first;
    std::copy(begin, begin + count + 1, folds->first_chunk);
    folds->first_array = static_cast<uint32_t>(first);
    submission.launch(kernel, static_cast<uint32_t>(count), fused_math::kFoldLanes, *folds);
  }
}

void launch_finish(
    mx::cu::CommandEncoder& encoder,
    CUfunction kernel,
    const MeasurePlan& plan,
    const MeasureInputs& in,
    const mx::array& sums,
    mx::array& measured,
    mx::array& skipped) {
  Submission submission(encoder, 1);
  submission.reads({&sums, in.skipped});
  submission.writes({&measured, &skipped});
  FinishLaunch finish{
      mx::gpu_ptr<Squares>(sums),
      mx::gpu_ptr<uint64_t>(*in.skipped),
      mx::gpu_ptr<float>(measured),
      mx::gpu_ptr<uint64_t>(skipped),
      static_cast<uint32_t>(plan.gradient_count),
      plan.control.flags};
  submission.launch(kernel, 1, fused_math::kFoldLanes, finish);
}

} // namespace

void measure(const Measurement& measurement) {
  auto& plan = measurement.plan;
  auto& in = measurement.inputs;
  const auto stream = measurement.stream;
  auto& encoder = mx::cu::get_command_encoder(stream);
  encoder.device().make_current();
  const auto batches = sort_arrays(plan, in);
  const auto kernels = kernels_for(plan, batches, encoder.device().cuda_device());

  // The step that follows finds this work pending, and cannot wait for MLX to let go of
  // the last step's buffers (see cuda/step.cpp).
  if (has_nothing_to_do(encoder)) {
    encoder.synchronize();
  }

  // All memory before anything is changed.
  auto measured_memory = allocate(measurement.measured.nbytes(), stream);
  auto skipped_memory = allocate(measurement.skipped.nbytes(), stream);
  auto chunks = temporary(batches.chunks(), stream);
  auto sums = temporary(batches.arrays(), stream);
  measurement.measured.set_data(std::move(measured_memory));
  measurement.skipped.set_data(std::move(skipped_memory));
  encoder.add_temporary(chunks);
  encoder.add_temporary(sums);

  launch_chunks(encoder, kernels, plan, in, batches, chunks);
  launch_folds(encoder, kernels.fold, plan, batches, chunks, sums, measurement.measured);
  launch_finish(encoder, kernels.finish, plan, in, sums, measurement.measured, measurement.skipped);
}

} // namespace mlx_fused_optim::cuda
