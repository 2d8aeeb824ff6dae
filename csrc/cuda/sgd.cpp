// Evaluation on a CUDA device: pointers are gathered, launches go to MLX's
// encoder of the stream, which makes a CUDA graph of them or not.
#include "sgd.h"

#include <cuda.h>

#include "cuda/backend.h"
#include "cuda/batches.h"
#include "cuda/kernels.h"
#include "cuda/memory.h"
#include "mlx/backend/cuda/device.h"

namespace mlx_fused_optim::cuda {

namespace {

Type type_of(mx::Dtype dtype) {
  return dtype == mx::float32 ? Type::float32
      : dtype == mx::float16  ? Type::float16
                              : Type::bfloat16;
}

Source source(const mx::array& a) {
  return {mx::gpu_ptr<void>(a), type_of(a.dtype()), a.flags().row_contiguous, a.strides().data()};
}

/// The encoder orders kernels by the buffers that they name. Many parameters are
/// views of one arena: name it once.
void set_inputs(mx::cu::CommandEncoder& encoder, const SgdPlan& plan, const SgdInputs& in) {
  const size_t n = plan.tensor_count();
  const void* last = nullptr;
  for (auto* arrays : {in.parameters, in.gradients}) {
    for (size_t i = 0; i < n; ++i) {
      if (arrays[i].buffer().ptr() != last) {
        last = arrays[i].buffer().ptr();
        encoder.set_input_array(arrays[i]);
      }
    }
  }
  for (auto* array : {in.momentum, &in.step, in.given}) {
    if (array) {
      encoder.set_input_array(*array);
    }
  }
}

void set_outputs(mx::cu::CommandEncoder& encoder, const SgdOutputs& out) {
  for (auto* array : {out.parameters, out.momentum, out.step, out.used}) {
    if (array) {
      encoder.set_output_array(*array);
    }
  }
}

/// Hundreds of arrays are read through three pointers each: descriptor, data and
/// buffer. Asks for what the next ones need, a pointer further at a time.
void prefetch(const mx::array* arrays, size_t i, size_t n) {
  if (i + 12 < n) {
    __builtin_prefetch(reinterpret_cast<const void*>(arrays[i + 12].id()));
  }
  if (i + 8 < n) {
    __builtin_prefetch(arrays[i + 8].data_shared_ptr().get());
  }
  if (i + 4 < n) {
    __builtin_prefetch(arrays[i + 4].buffer().ptr());
  }
}

Batches sort_tensors(const SgdPlan& plan, const SgdInputs& in, Type type) {
  Batches batches(type, !in.momentum || in.momentum->flags().row_contiguous);
  for (size_t i = 0; i < plan.tensor_count(); ++i) {
    prefetch(in.parameters, i, plan.tensor_count());
    prefetch(in.gradients, i, plan.tensor_count());
    auto& shape = plan.arena->shapes[i];
    batches.add(
        shape.size(),
        shape.data(),
        plan.arena->offsets[i],
        source(in.parameters[i]),
        source(in.gradients[i]));
  }
  if (batches.launches() == 0 && plan.writes_step) { // no tensors: only the step counts
    auto& empty = *batches.flat.emplace_back(new Batch<Flat>);
    empty.arguments.common.count = 0;
    empty.blocks = 1;
  }
  return batches;
}

template <typename T>
T* pointer(mx::array* a) {
  return a ? mx::gpu_ptr<T>(*a) : nullptr;
}

Common common_arguments(const SgdPlan& plan, const SgdInputs& in, const SgdOutputs& out) {
  Common common{};
  common.control = plan.control;
  common.step = mx::gpu_ptr<uint64_t>(in.step);
  common.given = in.given ? mx::gpu_ptr<float>(*in.given) : nullptr;
  common.step_out = pointer<uint64_t>(out.step);
  common.used_out = pointer<float>(out.used);
  common.parameters_out = pointer<void>(out.parameters);
  common.velocity_out = pointer<void>(out.momentum);
  if (in.momentum) {
    auto& momentum = *in.momentum;
    const bool flat = momentum.ndim() == 1;
    common.velocity = mx::gpu_ptr<void>(momentum);
    common.velocity_columns = momentum.shape(-1);
    common.velocity_row_stride = flat ? 0 : momentum.strides(0);
    common.velocity_column_stride = momentum.strides(-1);
  }
  common.aligned = 1;
  for (const void* data :
       {static_cast<const void*>(common.parameters_out),
        common.velocity,
        static_cast<const void*>(common.velocity_out)}) {
    common.aligned &= reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
  return common;
}

/// Launches batch after batch; the first of a step counts it.
class Launcher {
 public:
  Launcher(mx::cu::CommandEncoder& encoder, Type type, const Common& common)
      : encoder_(encoder), type_(type), common_(common) {}

  template <typename T>
  void launch(Kind kind, const BatchList<T>& batches) {
    for (auto& batch : batches) {
      launch(kind, *batch);
    }
  }

  template <typename T>
  void launch(Kind kind, Batch<T>& batch) {
    common_.count = batch.arguments.common.count;
    batch.arguments.common = common_;
    void* arguments[] = {&batch.arguments};
    encoder_.add_kernel_node_raw(
        step_kernel(kind, type_, encoder_.device().cuda_device()),
        dim3(batch.blocks),
        dim3(kind == Kind::transposed ? kSquareThreads : kThreads),
        dim3(),
        0,
        arguments);
    common_.step_out = nullptr;
  }

 private:
  mx::cu::CommandEncoder& encoder_;
  Type type_;
  Common common_;
};

// The encoder's number of kernels that wait to be launched. Private; an explicit
// instantiation may name it, and MLX's version is pinned.
template <auto Member>
struct PendingKernels {
  friend int pending_kernels(mx::cu::CommandEncoder& encoder) { return encoder.*Member; }
};
template struct PendingKernels<&mx::cu::CommandEncoder::node_count_>;
int pending_kernels(mx::cu::CommandEncoder& encoder);

/// Whether everything that was launched on the stream is done.
bool is_idle(mx::cu::CommandEncoder& encoder) {
  return cuStreamQuery(static_cast<cudaStream_t>(encoder.stream())) == CUDA_SUCCESS;
}

/// MLX lets go of the buffers of finished work on a thread of its own, and mx.eval
/// does not wait for that. A step that follows at once would find its arenas held
/// and move to fresh ones. Waits, but only where nothing else is to be done.
void let_go_of_finished_work(
    mx::cu::CommandEncoder& encoder,
    const SgdPlan& plan,
    const SgdInputs& in) {
  auto uses = [](const mx::array& a) {
    return static_cast<size_t>(a.data_shared_ptr().use_count());
  };
  const bool held = (plan.tensor_count() > 0 && uses(in.parameters[0]) > plan.tensor_count()) ||
      (in.momentum && uses(*in.momentum) > 1);
  if (held && pending_kernels(encoder) == 0 && is_idle(encoder)) {
    encoder.synchronize();
  }
}

/// Fewer bytes than these take less time on the device than a launch of their own.
constexpr size_t kWorthALaunch = size_t(4) << 20;

void step(const Step& step) {
  auto& plan = step.plan;
  auto& in = step.inputs;
  auto& encoder = mx::cu::get_command_encoder(step.stream);
  encoder.device().make_current();
  const Type type = type_of(plan.arena->dtype);
  const auto batches = sort_tensors(plan, in, type);
  step_kernel(Kind::flat, type, encoder.device().cuda_device()); // loaded, or an error now

  let_go_of_finished_work(encoder, plan, in);
  const auto out = step.set_outputs([&](size_t bytes) { return allocate(bytes, step.stream); });
  set_inputs(encoder, plan, in);
  set_outputs(encoder, out);
  Launcher launcher(encoder, type, common_arguments(plan, in, out));
  auto launch_all = [&] {
    launcher.launch(Kind::flat, batches.flat);
    launcher.launch(Kind::transposed, batches.transposed);
    launcher.launch(Kind::strided, batches.strided);
  };
  if (batches.launches() > 1) {
    // They write disjoint parts of one arena: the encoder would put them in line.
    auto concurrent = encoder.concurrent_context();
    launch_all();
  } else {
    launch_all();
  }

  // The device has nothing to do: it starts while the host goes on to the views.
  if (plan.arena->size * plan.arena->dtype.size() >= kWorthALaunch && is_idle(encoder)) {
    encoder.commit();
  }
}

void evaluate_schedule(
    const Schedule& schedule,
    const mx::array& steps,
    mx::array& rates,
    mx::Stream stream) {
  auto& encoder = mx::cu::get_command_encoder(stream);
  encoder.device().make_current();
  const auto kernel = schedule_kernel(encoder.device().cuda_device());
  rates.set_data(allocate(rates.nbytes(), stream));
  if (rates.size() == 0) {
    return;
  }
  ScheduleLaunch launch{
      schedule, mx::gpu_ptr<uint64_t>(steps), mx::gpu_ptr<float>(rates), rates.size()};
  void* arguments[] = {&launch};
  encoder.set_input_array(steps);
  encoder.set_output_array(rates);
  // The kernel loops: more blocks than this would not run at once on any GPU.
  const auto blocks = std::min<uint64_t>((rates.size() + kThreads - 1) / kThreads, 4096);
  encoder.add_kernel_node_raw(
      kernel, dim3(static_cast<uint32_t>(blocks)), dim3(kThreads), dim3(), 0, arguments);
}

constexpr Backend kBackend = {step, evaluate_schedule};

} // namespace

extern "C" __attribute__((visibility("default"))) const Backend* mlx_fused_optim_cuda_backend() {
  return &kBackend;
}

} // namespace mlx_fused_optim::cuda
