#include "graph/measure.h"

#include "composed/step.h"
#include "composed/switch.h"
#include "composed/transforms.h"
#include "graph/step.h"
#include "mlx/transforms.h"

namespace mlx_fused_optim {

namespace {

using namespace fused_math;

ComposedOperation composed_operation(const MeasurePlan& plan, mx::Stream s) {
  const int step = static_cast<int>(plan.array_count());
  return {
      [&plan, s](const std::vector<mx::array>& inputs) {
        return measure_composed(plan, inputs, s);
      },
      {step, step + 1},
      {{1, mx::array(uint64_t(0), mx::uint64)}}};
}

/// The sum of the squares, in rows: one sum over everything errs by 15 % at 1e8 elements
/// in MLX 0.32.4 on the CPU, as it adds in few lanes.
mx::array sum_of_squares(const mx::array& x, mx::Stream s) {
  constexpr int kRow = 512;
  auto values = mx::flatten(mx::square(x, s), s);
  while (values.size() > kRow) {
    const int size = static_cast<int>(values.size());
    values = mx::pad(
        values,
        std::pair<int, int>{0, (kRow - size % kRow) % kRow},
        mx::array(0.0f),
        "constant",
        s);
    values = mx::sum(mx::reshape(values, {-1, kRow}, s), -1, false, s);
  }
  return mx::sum(values, s);
}

/// A sum of squares of what was divided by a power of two (see csrc/math/norm.h).
struct ScaledSum {
  mx::array sum;
  mx::array scale; // the power of two
};

/// A tensor's, at the scale of its largest magnitude; at 1 where that is not finite.
ScaledSum scaled_sum(const mx::array& x, mx::Stream s) {
  auto scale = mx::array(0x1p-126f);
  if (x.size() > 0) {
    const auto peak = mx::stop_gradient(mx::max(mx::abs(x, s), s), s);
    const auto exponent =
        mx::bitwise_and(mx::view(peak, mx::uint32, s), mx::array(0x7f800000u, mx::uint32), s);
    // Both ends have a reciprocal that is a normal number.
    const auto power = mx::maximum(mx::view(exponent, mx::float32, s), scale, s);
    scale = mx::minimum(power, mx::array(0x1p126f), s);
    scale = mx::where(mx::isfinite(peak, s), scale, mx::array(1.0f), s);
  }
  const auto factor = mx::divide(mx::array(1.0f), scale, s);
  return {sum_of_squares(mx::multiply(x, factor, s), s), scale};
}

/// 0, infinity and NaN are their own roots, and as such have a derivative.
mx::array root(const mx::array& x, mx::Stream s) {
  const auto ordinary = mx::logical_and(mx::greater(x, mx::array(0.0f), s), mx::isfinite(x, s), s);
  return mx::where(ordinary, mx::sqrt(mx::where(ordinary, x, mx::array(1.0f), s), s), x, s);
}

} // namespace

std::vector<mx::array> measure_gradients(
    const MeasurePlan& plan,
    const std::vector<mx::array>& inputs,
    mx::Stream stream) {
  if (composed_is_asked_for()) {
    return measure_composed(plan, inputs, stream);
  }
  return mx::array::make_arrays(
      {plan.measured_shape(), {}},
      {mx::float32, mx::uint64},
      std::make_shared<MeasureGradients>(stream, plan),
      inputs);
}

std::vector<mx::array> measure_composed(
    const MeasurePlan& plan,
    const std::vector<mx::array>& inputs,
    mx::Stream s) {
  MeasureInputs in(plan, inputs);
  const uint32_t flags = plan.control.flags;
  auto unscale = mx::array(1.0f);
  if (flags & kGradScale) {
    unscale = composed_unscale(plan.control, in.step, in.given, s);
  }

  const auto clipped = [&](mx::array g) {
    if (flags & kClipValue) {
      const auto limit = mx::array(plan.control.clip_value);
      const auto least = mx::negative(limit, s);
      g = mx::where(mx::greater(g, limit, s), limit, g, s);
      g = mx::where(mx::less(g, least, s), least, g, s);
    }
    return g;
  };
  auto finite = mx::array(true);
  std::vector<ScaledSum> sums; // of every gradient
  for (size_t i = 0; i < plan.gradient_count; ++i) {
    const auto g = mx::astype(in.arrays[i], mx::float32, s);
    const auto unscaled = mx::multiply(g, unscale, s);
    const auto is_finite = mx::all(mx::isfinite(unscaled, s), s);
    finite = mx::logical_and(finite, is_finite, s);
    auto sum = scaled_sum(clipped(unscaled), s);
    if (flags & kSkipNonfinite) {
      // A skipped step is the identity: infinities have no way into its derivatives.
      const auto factor = mx::where(is_finite, unscale, mx::array(1.0f), s);
      const auto harmless = mx::where(is_finite, g, mx::array(0.0f), s);
      const auto other = scaled_sum(clipped(mx::multiply(harmless, factor, s)), s);
      sum = {
          mx::where(is_finite, other.sum, mx::stop_gradient(sum.sum, s), s),
          mx::where(is_finite, other.scale, sum.scale, s)};
    }
    sums.push_back(sum);
  }
  auto scale = mx::array(0x1p-126f);
  for (auto& sum : sums) {
    scale = mx::maximum(scale, sum.scale, s);
  }
  auto total = mx::array(0.0f);
  for (auto& sum : sums) {
    const auto ratio = mx::divide(sum.scale, scale, s);
    total = mx::add(total, mx::multiply(mx::multiply(sum.sum, ratio, s), ratio, s), s);
  }
  const auto norm_of = [&](const ScaledSum& x) { return mx::multiply(root(x.sum, s), x.scale, s); };
  const auto norm = norm_of({total, scale});
  if (flags & kClipNorm) {
    finite = mx::logical_and(finite, mx::isfinite(norm, s), s);
  }
  const auto apply = flags & kSkipNonfinite ? finite : mx::array(true);

  std::vector<mx::array> measured = {norm, mx::astype(apply, mx::float32, s)};
  for (size_t i = 0; plan.has_parameters && i < plan.gradient_count; ++i) {
    const auto& parameter = in.arrays[plan.gradient_count + i];
    measured.push_back(norm_of(sums[i]));
    measured.push_back(norm_of(scaled_sum(mx::astype(parameter, mx::float32, s), s)));
  }
  const auto skipped =
      mx::add(*in.skipped, mx::astype(mx::logical_not(apply, s), mx::uint64, s), s);
  return {mx::stack(measured, 0, s), skipped};
}

mx::array norms_of(const std::vector<mx::array>& tensors, mx::Stream s) {
  // Measured as gradients and parameters by turns, since the norms of a pair lie together.
  MeasurePlan plan{{}, (tensors.size() + 1) / 2, true};
  plan.control.flags = kTrustRatio;
  std::vector<mx::array> inputs;
  for (size_t first : {0, 1}) {
    for (size_t i = first; i < 2 * plan.gradient_count; i += 2) {
      inputs.push_back(i < tensors.size() ? tensors[i] : mx::array(0.0f));
    }
  }
  inputs.push_back(mx::array(uint64_t(0), mx::uint64));
  inputs.push_back(mx::array(uint64_t(0), mx::uint64));
  const auto measured = measure_gradients(plan, inputs, s)[0];
  return arena_tensor(measured, {static_cast<int>(tensors.size())}, kMeasuredTensors, s);
}

std::vector<mx::array> MeasureGradients::jvp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& tangents,
    const std::vector<int>& argnums) {
  return composed_jvp(composed_operation(plan_, stream()), primals, tangents, argnums);
}

std::vector<mx::array> MeasureGradients::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents,
    const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  return composed_vjp(composed_operation(plan_, stream()), primals, cotangents, argnums);
}

std::pair<std::vector<mx::array>, std::vector<int>> MeasureGradients::vmap(
    const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  return composed_vmap(
      composed_operation(plan_, stream()), inputs, axes, {plan_.measured_shape(), {}});
}

} // namespace mlx_fused_optim
