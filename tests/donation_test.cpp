// When a step may write into the memory of its inputs, where Python cannot bring it about:
// memory that MLX only borrows, and an allocation that fails. Built by test_donation.py
// with csrc/graph/donation.cpp, which every backend uses, and MLX.
#include "graph/donation.h"

#include <cstdio>
#include <cstdlib>
#include <new>

#include "mlx/allocator.h"

namespace mlx_fused_optim {

// As step.cpp and layout.cpp have them, for a plan with parameters, momentum and a step.
StepInputs::StepInputs(const StepPlan& plan, const mx::array* arrays, const mx::array*)
    : plan(&plan), gradients(nullptr), parameters(arrays), slots{} {
  slots[fused_math::Sgd::kVelocity] = &arrays[plan.parameter_inputs()];
}
StepOutputs::StepOutputs(const StepPlan&, mx::array* arrays)
    : begin(arrays), parameters(&arrays[0]), slots{}, step(&arrays[2]), used(nullptr) {
  slots[fused_math::Sgd::kVelocity] = &arrays[1];
}
std::vector<StepInputs> StepNode::inputs(const std::vector<mx::array>& arrays) const {
  return {StepInputs(plans[0], arrays.data(), nullptr)};
}
std::vector<StepOutputs> StepNode::outputs(std::vector<mx::array>& arrays) const {
  return {StepOutputs(plans[0], arrays.data())};
}
mx::Shape arena_shape(const Arena& arena) { return {int(arena.size)}; }

} // namespace mlx_fused_optim

namespace {

using namespace mlx_fused_optim;
namespace mx = mlx::core;

void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "not so: %s\n", what);
    std::exit(1);
  }
}

/// Somebody else's: a mapped file, for example. As MLX's CPU allocator would have it, so that
/// nothing but the ownership tells.
struct Foreign {
  size_t size = sizeof(float) * 128;
  float elements[128];
};
Foreign foreign[2];
enum Owner { mlx, somebody };

mx::array memory(Owner owner, int which) {
  mx::array a({128}, mx::float32, nullptr, {});
  if (owner == mlx) {
    a.set_data(mx::allocator::malloc(foreign[which].size));
  } else {
    a.set_data({mx::allocator::Buffer(&foreign[which]), [](mx::allocator::Buffer) {}});
  }
  a.set_status(mx::array::Status::available);
  return a;
}

/// A step of two tensors of 64 elements, and its graph before it is evaluated.
struct Step {
  StepNode node{{StepPlan{}}, {}};
  std::vector<mx::array> inputs, outputs;

  Step(Owner parameters, Owner momentum, bool whole) {
    auto arena = std::make_shared<Arena>(Arena{mx::float32});
    arena->shapes = {{64}, {64}};
    arena->tensors = {0, 1};
    arena->offsets = {0, 64};
    arena->size = 128;
    node.plans[0].arena = arena;
    node.plans[0].whole = whole;
    auto flat = memory(parameters, 0);
    for (int i = 0; i < 2 && !whole; ++i) {
      mx::array view({64}, mx::float32, nullptr, {});
      view.copy_shared_buffer(flat, {1}, {true, true, true}, 64, 64 * i);
      inputs.push_back(std::move(view));
    }
    if (whole) {
      inputs.push_back(std::move(flat));
    }
    inputs.push_back(memory(momentum, 1));
    for (int i = 0; i < 3; ++i) {
      outputs.emplace_back(mx::Shape{128}, mx::float32, nullptr, inputs);
    }
    // MLX evaluates with the inputs of one output.
    std::vector<mx::array> own = std::move(outputs[0].inputs());
    outputs[0].inputs().clear();
    inputs = std::move(own);
  }

  bool is_in_place(int output, int input) const {
    return outputs[output].data_shared_ptr() == inputs[input].data_shared_ptr();
  }
};

mx::allocator::Data allocate(size_t bytes) {
  return mx::allocator::Data(mx::allocator::malloc(bytes));
}

void test_borrowed_memory_is_not_written() {
  for (bool whole : {false, true}) {
    for (auto parameters : {mlx, somebody}) {
      for (auto momentum : {mlx, somebody}) {
        Step step(parameters, momentum, whole);
        set_outputs(step.node, step.inputs, step.outputs, allocate);
        require(step.is_in_place(0, 0) == (parameters == mlx), "parameters");
        require(step.is_in_place(1, whole ? 1 : 2) == (momentum == mlx), "momentum");
      }
    }
  }
}

void test_a_failed_allocation_leaves_everything_as_it_was() {
  Step step(mlx, mlx, false);
  const auto number = step.inputs.size();
  bool has_thrown = false;
  try {
    set_outputs(step.node, step.inputs, step.outputs, [](size_t) -> mx::allocator::Data {
      throw std::bad_alloc(); // for the step counter, when all else is in place
    });
  } catch (const std::bad_alloc&) {
    has_thrown = true;
  }
  require(has_thrown, "the error comes through");
  for (auto& output : step.outputs) {
    require(!output.buffer().ptr(), "an output has no memory");
    require(output.inputs().size() == number, "an output has its inputs");
  }
  require(step.inputs[0].data_shared_ptr().use_count() == 2, "nobody else has the parameters");
  require(step.inputs[2].data_shared_ptr().use_count() == 1, "nobody else has the momentum");
}

} // namespace

int main() {
  test_borrowed_memory_is_not_written();
  test_a_failed_allocation_leaves_everything_as_it_was();
}
