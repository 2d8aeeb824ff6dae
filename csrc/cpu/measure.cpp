// The measurement of the gradients on the CPU, in the order of csrc/math/norm.h.
#include "graph/measure.h"

#include <algorithm>
#include <functional>
#include <memory>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/sources.h"
#include "mlx/backend/cpu/encoder.h"

namespace mlx_fused_optim {

namespace {

using fused_math::kChunk;
using fused_math::kFoldLanes;
using fused_math::Squares;

// Chunks a thread must have to be worth waking.
constexpr size_t kMeasureGrain = 32;

/// values[0], ..., values[count - 1], folded.
Squares fold_all(const Squares* values, size_t count) {
  Squares lanes[kFoldLanes];
  const size_t used = std::min<size_t>(count, kFoldLanes);
  for (size_t lane = 0; lane < used; ++lane) {
    lanes[lane] = {};
    for (size_t i = lane; i < count; i += kFoldLanes) {
      lanes[lane] = fused_math::fold(lanes[lane], values[i]);
    }
  }
  // Lanes from `used` on are zeros, which change nothing.
  for (size_t half = kFoldLanes / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half && lane + half < used; ++lane) {
      lanes[lane] = fused_math::fold(lanes[lane], lanes[lane + half]);
    }
  }
  return used > 0 ? lanes[0] : Squares{};
}

struct MeasureTask {
  MeasureTask(const MeasurePlan& plan, const MeasureInputs& in) : plan(plan) {
    size_t chunk = 0;
    for (size_t i = 0; i < plan.array_count(); ++i) {
      auto& array = in.arrays[i];
      arrays.push_back(fills_memory(array) ? cpu::Sources::flat(array) : sources.of(array));
      sizes.push_back(array.size());
      first_chunks.push_back(chunk);
      chunk += (array.size() + kChunk - 1) / kChunk;
    }
    first_chunks.push_back(chunk);
  }

  void run() const {
    auto& control = plan.control;
    const auto hyper = fused_math::step_gradient_hyper(control, *step, given);
    std::vector<Squares> chunks(first_chunks.back());
    cpu::parallel_for(chunks.size(), kMeasureGrain, [&](size_t begin, size_t end) {
      size_t a = std::upper_bound(first_chunks.begin(), first_chunks.end(), begin) -
          first_chunks.begin() - 1;
      for (size_t c = begin; c < end; ++c) {
        while (c >= first_chunks[a + 1]) {
          ++a;
        }
        const size_t at = (c - first_chunks[a]) * kChunk;
        const size_t n = std::min<size_t>(kChunk, sizes[a] - at);
        // Parameters are measured as they are.
        const uint32_t flags = a < plan.gradient_count ? control.flags : 0;
        chunks[c] = cpu::kernels().measure(arrays[a], at, n, hyper, flags);
      }
    });

    std::vector<Squares> sums(arrays.size());
    for (size_t a = 0; a < arrays.size(); ++a) {
      const size_t first = first_chunks[a];
      sums[a] = fold_all(chunks.data() + first, first_chunks[a + 1] - first);
    }
    const auto total = fold_all(sums.data(), plan.gradient_count);
    const float norm = fused_math::norm_of(total);
    const bool apply = fused_math::step_applies(control.flags, total, norm);
    measured[fused_math::kMeasuredNorm] = norm;
    measured[fused_math::kMeasuredApply] = apply;
    for (size_t t = 0; plan.has_parameters && t < plan.gradient_count; ++t) {
      float* norms = measured + fused_math::kMeasuredTensors + 2 * t;
      norms[0] = fused_math::norm_of(sums[t]);
      norms[1] = fused_math::norm_of(sums[plan.gradient_count + t]);
    }
    *skipped_out = *skipped + !apply;
  }

  MeasurePlan plan;
  cpu::Sources sources;
  std::vector<cpu::Source> arrays;
  std::vector<size_t> sizes;
  std::vector<size_t> first_chunks; // of each array, and the number of all
  const uint64_t* step;
  const uint64_t* skipped;
  const float* given;
  float* measured;
  uint64_t* skipped_out;
};

} // namespace

void MeasureGradients::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  for (auto& output : outputs) {
    output.set_data(mx::allocator::malloc(output.nbytes()));
  }
  MeasureInputs in(plan_, inputs);
  auto task = std::make_shared<MeasureTask>(plan_, in);
  task->step = in.step->data<uint64_t>();
  task->skipped = in.skipped->data<uint64_t>();
  task->given = in.given ? in.given->data<float>() : nullptr;
  task->measured = outputs[0].data<float>();
  task->skipped_out = outputs[1].data<uint64_t>();
  auto& encoder = mx::cpu::get_command_encoder(stream());
  encoder.dispatch([task] { task->run(); });
}

} // namespace mlx_fused_optim
