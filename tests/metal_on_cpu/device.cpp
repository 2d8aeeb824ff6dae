#include "mlx/backend/metal/device.h"

#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "memory.h"
#include "mlx/backend/cpu/encoder.h"

using namespace metal_on_cpu;

namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error("[metal_on_cpu] " + what);
}

std::string setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

/// While it lives, float32 arithmetic takes and gives zeros for subnormals, as Apple's GPUs
/// do. (Conversions of float16 know nothing of it, there and here.)
class Flushing {
 public:
  explicit Flushing(bool on) : before_(_mm_getcsr()) {
    if (on) {
      _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | 0x40); // and denormals are zeros
    }
  }
  ~Flushing() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

// ---- What tests look at --------------------------------------------------------

struct Record {
  std::string kernel, pipeline;
  size_t threads, group;
  bool barrier; // before it
  std::map<std::string, Traffic> traffic; // known once it ran
};

std::mutex mutex; // of all below: the host encodes while a stream runs
std::vector<std::shared_ptr<Record>> records;
Memory memory;
std::vector<std::shared_ptr<mlx::core::array::Data>> pending; // until metal_on_cpu_clear

std::map<int, std::unique_ptr<mlx::core::metal::CommandEncoder>> encoders; // by stream

/// Whether the command buffer never completes by itself, so that memory has to be held.
bool keeps() { return std::string(setting("METAL_ON_CPU_KEEP", "0")) == "1"; }

} // namespace

extern "C" __attribute__((visibility("default"))) const char* metal_on_cpu_log() {
  std::lock_guard lock(mutex);
  std::ostringstream json;
  const char* separator = "[";
  for (auto& r : records) {
    json << separator << "{\"kernel\":\"" << r->kernel << "\",\"pipeline\":\"" << r->pipeline
         << "\",\"threads\":" << r->threads << ",\"group\":" << r->group
         << ",\"barrier\":" << (r->barrier ? "true" : "false") << ",\"traffic\":{";
    const char* comma = "";
    for (auto& [name, t] : r->traffic) {
      json << comma << '"' << name << "\":{\"read\":" << t.read
           << ",\"read_again\":" << t.read_again << ",\"written\":" << t.written
           << ",\"accesses\":" << t.accesses << '}';
      comma = ",";
    }
    json << "}}";
    separator = ",";
  }
  static std::string text;
  text = records.empty() ? "[]" : json.str() + "]";
  return text.c_str();
}

namespace metal_on_cpu {

void hold_until_completed(const mlx::core::array& temporary) {
  if (keeps()) {
    std::lock_guard lock(mutex);
    pending.push_back(temporary.data_shared_ptr());
  }
}

void hold_until_completed(
    const std::vector<mlx::core::array>& inputs,
    const std::vector<mlx::core::array>& outputs) {
  if (!keeps()) {
    return;
  }
  // As mlx/backend/metal/eval.cpp has it: inputs and siblings, but not what was donated.
  std::set<std::shared_ptr<mlx::core::array::Data>> held;
  for (auto& input : inputs) {
    held.insert(input.data_shared_ptr());
  }
  for (auto& output : outputs) {
    held.insert(output.data_shared_ptr());
  }
  held.erase(outputs[0].data_shared_ptr());
  std::lock_guard lock(mutex);
  pending.insert(pending.end(), held.begin(), held.end());
}

} // namespace metal_on_cpu

extern "C" __attribute__((visibility("default"))) void metal_on_cpu_clear() {
  std::lock_guard lock(mutex);
  pending.clear();
  records.clear();
  for (auto& [stream, encoder] : encoders) {
    encoder->forget_hazards();
  }
}

// ---- Device --------------------------------------------------------------------

NS::UInteger MTL::ComputePipelineState::maxTotalThreadsPerThreadgroup() const {
  return std::stoul(setting("METAL_ON_CPU_MAX_THREADS", "1024"));
}

namespace mlx::core::metal {

Device& device(mlx::core::Device) {
  static Device device;
  return device;
}

CommandEncoder& get_command_encoder(Stream s) {
  auto& encoder = encoders[s.index];
  if (!encoder) {
    encoder = std::make_unique<CommandEncoder>(s);
  }
  return *encoder;
}

MTL::Library* Device::get_library(
    const std::string& name,
    const CompileOptions& options,
    const std::function<std::string(void)>& builder) {
  // Before the cache, so that a test may set it at any time.
  if (auto message = setting("METAL_ON_CPU_COMPILER_ERROR", ""); !message.empty()) {
    throw std::runtime_error(
        "[metal::Device] Unable to build metal library from source\n" + message);
  }
  if (options.math_mode != MathMode::Safe) {
    fail("the kernels must be compiled in safe math mode");
  }
  auto [entry, is_new] = libraries_.try_emplace(name);
  if (is_new && builder() != library().source) {
    fail("library '" + name + "' is not the source that was compiled for the CPU");
  }
  return &entry->second;
}

MTL::ComputePipelineState* Device::get_kernel(
    const std::string& name,
    MTL::Library*,
    const std::string& cached_as,
    const MTLFCList& values) {
  std::map<int, uint32_t> constants;
  for (auto& [value, type, index] : values) {
    const auto& known = library().constants;
    const auto constant =
        std::find_if(known.begin(), known.end(), [&](auto& c) { return c.index == int(index); });
    const auto expected = constant == known.end() ? MTL::DataType::DataTypeNone
        : constant->flag                          ? MTL::DataType::DataTypeBool
                                                  : MTL::DataType::DataTypeUInt;
    if (type != expected || constant == known.end()) {
      fail(name + ": no function constant " + std::to_string(index) + " has this type");
    }
    constants[int(index)] = type == MTL::DataType::DataTypeBool
        ? *static_cast<const bool*>(value)
        : *static_cast<const uint32_t*>(value);
  }
  auto& pipeline = pipelines_[cached_as.empty() ? name : cached_as];
  if (!pipeline) {
    for (auto& kernel : library().kernels) {
      if (kernel.name == name) {
        pipeline.reset(new MTL::ComputePipelineState{&kernel, constants, cached_as});
      }
    }
  }
  if (!pipeline) {
    throw std::runtime_error("[metal::Device] Unable to load function " + name);
  }
  // MLX would hand out this pipeline whatever is asked for now.
  if (pipeline->kernel->name != name || pipeline->constants != constants) {
    fail("pipeline '" + cached_as + "' is asked for with another kernel or other constants");
  }
  return pipeline.get();
}

// ---- Encoder: bindings ---------------------------------------------------------

CommandEncoder::Binding& CommandEncoder::binding(int slot) {
  if (slot < 0 || slot >= kSlots) {
    fail("slot " + std::to_string(slot) + " does not exist");
  }
  return bindings_[slot] = {};
}

void CommandEncoder::bind(const array& a, int slot, int64_t offset, Binding::Kind kind) {
  if (!a.data_shared_ptr()) {
    fail("the array for slot " + std::to_string(slot) + " has no memory");
  }
  auto& b = binding(slot);
  b.kind = kind;
  b.begin = static_cast<char*>(const_cast<array&>(a).buffer().raw_ptr());
  b.size = a.buffer_size();
  b.offset = a.offset() + offset;
  b.element = a.itemsize();
  b.memory = a.data_shared_ptr();
  if (b.offset < 0 || b.offset > int64_t(b.size)) {
    fail("the offset of slot " + std::to_string(slot) + " is outside of the buffer");
  }
}

void CommandEncoder::set_input_array(const array& a, int slot, int64_t offset) {
  bind(a, slot, offset, Binding::input);
  inputs_.insert(a.buffer().ptr());
  needs_barrier_ |= earlier_outputs_.count(a.buffer().ptr()) > 0;
}

void CommandEncoder::set_output_array(array& a, int slot, int64_t offset) {
  set_input_array(a, slot, offset);
  bindings_[slot].kind = Binding::output;
  if (concurrent_) {
    concurrent_outputs_.insert(a.buffer().ptr());
    // MLX does not ask here whether an earlier command still reads it.
    if (keeps() && !needs_barrier_ && read_before_group_.count(a.buffer().ptr())) {
      fail("a write into memory that an earlier dispatch reads, with no barrier between them");
    }
  } else {
    outputs_.insert(a.buffer().ptr());
    needs_barrier_ |= earlier_inputs_.count(a.buffer().ptr()) > 0;
  }
}

void CommandEncoder::set_value(const void* data, size_t size, size_t element, int slot) {
  if (size > 4096) {
    fail("slot " + std::to_string(slot) + ": Metal takes at most 4 KiB by value");
  }
  auto& b = binding(slot);
  b.kind = Binding::value;
  b.size = size;
  b.element = element;
  b.bytes.assign(static_cast<const char*>(data), static_cast<const char*>(data) + size);
}

void CommandEncoder::add_temporary(array a) {
  metal_on_cpu::hold_until_completed(a);
  cpu::get_command_encoder(stream_).add_temporary(std::move(a));
}

void CommandEncoder::forget_hazards() {
  earlier_inputs_.clear();
  earlier_outputs_.clear();
  read_before_group_.clear();
  needs_barrier_ = false;
}

bool CommandEncoder::takes_barrier() {
  const bool barrier = needs_barrier_;
  if (barrier) {
    forget_hazards();
  }
  earlier_inputs_.merge(inputs_);
  earlier_outputs_.merge(outputs_);
  inputs_.clear();
  outputs_.clear();
  needs_barrier_ = false;
  return barrier;
}

/// Every argument of the kernel has what it expects, and nothing else is bound.
void CommandEncoder::check(const MTL::Size& threads, const MTL::Size& group) const {
  if (!pipeline_) {
    fail("a dispatch without a pipeline state");
  }
  auto& kernel = *pipeline_->kernel;
  auto require = [&](bool holds, const std::string& what) {
    if (!holds) {
      fail(kernel.name + ": " + what);
    }
  };
  require(threads.width > 0 && group.width > 0, "an empty grid or threadgroup");
  require(
      threads.height * threads.depth * group.height * group.depth == 1,
      "the harness has one-dimensional grids only");
  require(threads.width < uint64_t(1) << 32, "more threads than uint counts");
  require(
      group.width <= pipeline_->maxTotalThreadsPerThreadgroup(),
      "a threadgroup of " + std::to_string(group.width) + " threads is too large");
  bool taken[kSlots] = {};
  for (auto& a : kernel.arguments) {
    if (a.kind != Kind::buffer) {
      continue;
    }
    const std::string where = std::string(a.name) + " [[buffer(" + std::to_string(a.slot) + ")]]";
    if (a.present) {
      for (auto& constant : library().constants) {
        if (constant.flag == a.present) {
          require(pipeline_->constants.count(constant.index), where + ": its constant is not set");
        }
      }
      if (!*a.present) {
        continue;
      }
    }
    auto& b = bindings_[a.slot];
    taken[a.slot] = true;
    require(b.kind != Binding::nothing, where + ": nothing is bound");
    // Of bytes, memory.h sees whether they are written.
    require(
        !a.writable || a.element == 1 || b.kind == Binding::output,
        where + ": written, but not an output");
    require(a.writable || b.kind != Binding::output, where + ": an output, but not written");
    // Bytes are read as any type: sources have their table, sums are structs.
    require(
        a.element == 1 || b.element == 1 || a.element == b.element,
        where + ": elements of " + std::to_string(b.element) + " bytes bound, the kernel has " +
            std::to_string(a.element));
    // On some GPUs a `constant` buffer must begin at a multiple of 256 bytes.
    require(!a.constant || b.kind == Binding::value, where + ": constant, but not a value");
    require(
        !a.by_reference || b.kind != Binding::value || b.size == a.element,
        where + ": a value of another size");
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    require(
        taken[slot] || bindings_[slot].kind == Binding::nothing,
        "slot " + std::to_string(slot) + " is bound, but is no argument");
  }
}

// ---- Encoder: dispatches -------------------------------------------------------

void CommandEncoder::dispatch_threadgroups(MTL::Size groups, MTL::Size group) {
  dispatch_threads({groups.width * group.width, groups.height, groups.depth}, group);
}

void CommandEncoder::dispatch_threads(MTL::Size threads, MTL::Size group) {
  auto set_constants = [pipeline = pipeline_] {
    for (auto& constant : library().constants) {
      auto value = pipeline->constants.find(constant.index);
      const bool is_set = value != pipeline->constants.end();
      if (constant.flag) {
        *constant.flag = is_set && value->second;
      } else {
        *constant.number = is_set ? value->second : ~0u; // which no kernel can work with
      }
    }
    library().derive();
  };
  std::shared_ptr<Record> record;
  {
    std::lock_guard lock(mutex); // constants are globals of the kernels
    if (pipeline_) {
      set_constants();
    }
    check(threads, group);
  }
  const bool barrier = takes_barrier();
  {
    std::lock_guard lock(mutex);
    record.reset(new Record{
        pipeline_->kernel->name, pipeline_->name, threads.width, group.width, barrier, {}});
    records.push_back(record);
  }
  const auto name = setting("METAL_ON_CPU_ORDER", "forward");
  const auto order = name == "reverse" ? Order::reverse
      : name == "shuffled"             ? Order::shuffled
                                       : Order::forward;
  auto bindings = std::make_shared<decltype(bindings_)>(std::move(bindings_));
  bindings_ = {};
  auto* kernel = pipeline_->kernel;
  pipeline_ = nullptr;
  // Buffers that MLX frees may come again as others: only a concurrent group,
  // within which nothing is freed, is watched as a whole.
  const bool fresh = barrier || !concurrent_ || group_begins_;
  group_begins_ = false;

  cpu::get_command_encoder(stream_).dispatch([=] {
    std::lock_guard lock(mutex);
    set_constants();
    memory.begin_dispatch(fresh);
    void* buffers[kSlots] = {};
    for (auto& a : kernel->arguments) {
      if (a.kind == Kind::buffer && (!a.present || *a.present)) {
        auto& b = (*bindings)[a.slot];
        const bool by_value = b.kind == Binding::value;
        if (!by_value && b.memory.expired()) {
          fail(kernel->name + ": the memory of " + a.name + " was freed before it ran");
        }
        char* begin = by_value ? b.bytes.data() : b.begin;
        buffers[a.slot] = begin + b.offset;
        const auto use = by_value       ? Memory::value
            : b.kind == Binding::output ? Memory::output
                                        : Memory::input;
        memory.add(begin, b.size, a.name, use);
      }
    }
    watch(&memory);
    {
      const Flushing flushing(std::string(setting("METAL_ON_CPU_FLUSH", "0")) == "1");
      run_grid(*kernel, buffers, threads.width, group.width, order, memory);
    }
    watch(nullptr);
    record->traffic = memory.traffic();
    if (!memory.error().empty()) {
      const auto error = kernel->name + ": " + memory.error();
      memory = {};
      fail(error);
    }
  });
}

} // namespace mlx::core::metal
