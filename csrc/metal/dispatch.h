// From the tensors of an arena to the tables of a few dispatches.
#pragma once

#include <optional>
#include <vector>

#include "graph/step.h"
#include "metal/pack.h"
#include "metal/sources.h"
#include "mlx/array.h"
#include "table.h"

namespace mlx_fused_optim::metal {

/// How to read an array as a matrix: element (r, c) at r * row_stride +
/// c * column_stride. With no columns it is flat: element i at i * column_stride.
struct MatrixView {
  int64_t row_stride;
  int64_t column_stride;
  uint32_t columns;
};

/// Such a view, in row-major order of the elements, if the strides allow one.
std::optional<MatrixView> matrix_view(const mx::array& a);

/// Whether element i is at i: what parameters and slots must be.
bool is_contiguous(const mx::array& a);

/// The threadgroups of a step: how many threads each has, and how wide its tiles are.
struct Threadgroups {
  size_t threads;
  uint32_t tile_columns;
};

/// One dispatch: its table, and the buffers that the table refers to.
struct Dispatch {
  explicit Dispatch(mx::Dtype gradient_dtype) : gradient_dtype(gradient_dtype) {}

  fused_metal::StepTable table{};
  BufferSources sources;
  mx::Dtype gradient_dtype;
  uint32_t blocks = 0; // threadgroups

  /// Adds a tensor, unless the table or `most_sources` slots are full.
  bool add(
      fused_metal::StepTensor tensor,
      const mx::array& parameter,
      const mx::array& gradient,
      size_t most_sources,
      Threadgroups groups);
};

/// The dispatches of a step: tensors whose gradients have one dtype together, as
/// many as there are slots. `readable` gives the inputs as they can be read through is_contiguous
/// and matrix_view; `gaps` says whether an output is fresh memory.
std::vector<Dispatch> make_dispatches(
    const StepPlan& plan,
    const StepInputs& in,
    const Packer& readable,
    bool arena_is_aligned,
    bool gaps,
    size_t most_sources,
    Threadgroups groups);

} // namespace mlx_fused_optim::metal
