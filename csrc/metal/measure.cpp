// The measurement of the gradients on Metal, in the order of csrc/math/norm.h: the sums
// of all chunks, side by side; then those of arrays; then of all gradients.
#include "graph/measure.h"
#include "graph/step.h"

#include <algorithm>

#include "measure_table.h"
#include "metal/library.h"
#include "metal/pack.h"
#include "metal/sources.h"
#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"
#include "table.h"

namespace mlx_fused_optim {

namespace {

using namespace fused_metal;
using mx::metal::CommandEncoder;

static_assert(sizeof(MeasureTable) <= 4096, "what Metal takes by value");

size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

/// One dispatch of measure_chunks.
struct ChunkDispatch {
  MeasureTable table{};
  metal::BufferSources sources;
  uint32_t blocks = 0; // threadgroups

  /// Adds an array, unless the table or the slots are full.
  bool add(MeasuredArray array, const mx::array& a, size_t chunks_a_block) {
    const auto known = sources.size();
    array.source = sources.of(a);
    if (sources.size() > kMeasuredSources || table.count == kMaxArrays) {
      sources.shrink(known);
      return false;
    }
    array.first_block = blocks;
    blocks += ceil_div(ceil_div(a.size(), fused_math::kChunk), chunks_a_block);
    table.arrays[table.count++] = array;
    return true;
  }
};

std::vector<ChunkDispatch> make_dispatches(
    const MeasurePlan& plan,
    const std::vector<const mx::array*>& arrays,
    const std::vector<uint32_t>& first_chunks,
    size_t chunks_a_block) {
  std::vector<ChunkDispatch> dispatches;
  for (size_t i = 0; i < arrays.size(); ++i) {
    auto& a = *arrays[i];
    if (a.size() == 0) {
      continue;
    }
    MeasuredArray array{};
    array.size = a.size();
    array.begin = a.offset();
    array.first_chunk = first_chunks[i];
    array.wide = a.offset() % (kQuad * a.itemsize()) == 0;
    array.format = format_of(a.dtype());
    array.is_gradient = i < plan.gradient_count;
    if (dispatches.empty() || !dispatches.back().add(array, a, chunks_a_block)) {
      dispatches.emplace_back().add(array, a, chunks_a_block);
    }
  }
  return dispatches;
}

/// Of every array, and behind them the number of all.
std::vector<uint32_t> first_chunks_of(const std::vector<const mx::array*>& arrays) {
  std::vector<uint32_t> first_chunks{0};
  for (auto* a : arrays) {
    first_chunks.push_back(first_chunks.back() + ceil_div(a->size(), fused_math::kChunk));
  }
  return first_chunks;
}

/// Memory for `count` sums, until they are read.
mx::array scratch(CommandEncoder& encoder, size_t count) {
  const int bytes = std::max<size_t>(count, 1) * sizeof(fused_math::Squares);
  mx::array sums({bytes}, mx::uint8, nullptr, std::vector<mx::array>{});
  sums.set_data(mx::allocator::malloc(sums.nbytes()));
  encoder.add_temporary(sums);
  return sums;
}

} // namespace

void MeasureGradients::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& device = mx::metal::device(stream().device);
  MeasureInputs in(plan_, inputs);
  auto* chunks_kernel = metal::kernel(device, "measure_chunks");
  auto* arrays_kernel = metal::kernel(device, "measure_arrays");
  auto* finish_kernel = metal::kernel(device, "measure_finish");
  const auto threads = [](MTL::ComputePipelineState* kernel) {
    return MTL::Size(metal::threads_for(kernel), 1, 1);
  };

  auto& encoder = mx::metal::get_command_encoder(stream());
  metal::Packer packer(device, encoder);
  std::vector<const mx::array*> arrays;
  {
    auto together = encoder.start_concurrent(); // the copies, if there are any
    for (size_t i = 0; i < plan_.array_count(); ++i) {
      arrays.push_back(&packer.readable(in.arrays[i], fills_memory(in.arrays[i])));
    }
  }
  for (auto& output : outputs) {
    output.set_data(mx::allocator::malloc(output.nbytes()));
  }

  const auto first_chunks = first_chunks_of(arrays);
  auto chunk_sums = scratch(encoder, first_chunks.back());
  {
    auto together = encoder.start_concurrent(); // they write disjoint sums
    const size_t chunks_a_block = metal::threads_for(chunks_kernel) / kChunkThreads;
    for (auto& dispatch : make_dispatches(plan_, arrays, first_chunks, chunks_a_block)) {
      encoder.set_compute_pipeline_state(chunks_kernel);
      encoder.set_bytes(plan_.control, kControlBuffer);
      encoder.set_bytes(dispatch.table, kTableBuffer);
      encoder.set_input_array(*in.step, kStepBuffer);
      if (in.given) {
        encoder.set_input_array(*in.given, kGivenBuffer);
      } else {
        encoder.set_bytes(0.0f, kGivenBuffer); // never read
      }
      encoder.set_output_array(chunk_sums, kChunkSumsBuffer);
      dispatch.sources.bind(encoder, kFirstMeasuredBuffer, kMeasuredSources);
      encoder.dispatch_threadgroups(MTL::Size(dispatch.blocks, 1, 1), threads(chunks_kernel));
    }
  }

  auto array_sums = scratch(encoder, arrays.size());
  if (!arrays.empty()) {
    mx::array firsts(first_chunks.begin(), {int(first_chunks.size())}, mx::uint32);
    encoder.add_temporary(firsts);
    encoder.set_compute_pipeline_state(arrays_kernel);
    encoder.set_input_array(firsts, kFirstChunksBuffer);
    encoder.set_output_array(array_sums, kArraySumsOutBuffer);
    encoder.set_input_array(chunk_sums, kChunkSumsBuffer);
    encoder.dispatch_threadgroups(MTL::Size(arrays.size(), 1, 1), threads(arrays_kernel));
  }

  encoder.set_compute_pipeline_state(finish_kernel);
  encoder.set_bytes(plan_.control, kControlBuffer);
  encoder.set_input_array(array_sums, kArraySumsBuffer);
  encoder.set_input_array(*in.skipped, kSkippedBuffer);
  encoder.set_bytes(uint32_t(plan_.gradient_count), kGradientCountBuffer);
  encoder.set_bytes(uint32_t(plan_.has_parameters), kHasParametersBuffer);
  encoder.set_output_array(outputs[0], kMeasuredOutBuffer);
  encoder.set_output_array(outputs[1], kSkippedOutBuffer);
  encoder.dispatch_threadgroups(MTL::Size(1, 1, 1), threads(finish_kernel));
}

} // namespace mlx_fused_optim
