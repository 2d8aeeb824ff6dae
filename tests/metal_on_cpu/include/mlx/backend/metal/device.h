// Double of MLX's mlx/backend/metal/device.h (0.32.4): the same names, signatures
// and rules, as far as the host code uses them. Kernels run on the CPU, in the
// order of MLX's CPU stream.
#pragma once

#include <Metal/Metal.hpp>
#include <array>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "mlx/array.h"
#include "mlx/backend/common/metal_kernel.h"
#include "mlx/device.h"
#include "mlx/utils.h"

namespace metal_on_cpu {

/// With METAL_ON_CPU_KEEP=1, what a command buffer keeps alive until it has completed, which
/// is when a test calls metal_on_cpu_clear.
void hold_until_completed(
    const std::vector<mlx::core::array>& inputs,
    const std::vector<mlx::core::array>& outputs);
void hold_until_completed(const mlx::core::array& temporary);

} // namespace metal_on_cpu

namespace mlx::core::metal {

using MTLFCList = std::vector<std::tuple<const void*, MTL::DataType, NS::UInteger>>;

class CommandEncoder {
 public:
  explicit CommandEncoder(Stream stream) : stream_(stream) {}
  CommandEncoder(const CommandEncoder&) = delete;

  struct ConcurrentContext {
    explicit ConcurrentContext(CommandEncoder& encoder) : encoder(encoder) {
      encoder.concurrent_ = true;
      encoder.group_begins_ = true;
      encoder.read_before_group_ = encoder.earlier_inputs_;
    }
    ~ConcurrentContext() {
      encoder.concurrent_ = false;
      encoder.earlier_outputs_.merge(encoder.concurrent_outputs_);
      encoder.concurrent_outputs_.clear();
    }

   private:
    CommandEncoder& encoder;
  };
  ConcurrentContext start_concurrent() { return ConcurrentContext(*this); }

  void set_compute_pipeline_state(MTL::ComputePipelineState* pipeline) { pipeline_ = pipeline; }
  void set_input_array(const array& a, int slot, int64_t offset = 0);
  void set_output_array(array& a, int slot, int64_t offset = 0);
  template <typename T>
  void set_bytes(const T& value, int slot) {
    set_value(&value, sizeof(T), sizeof(T), slot);
  }
  template <typename Vec, typename = std::enable_if_t<is_vector_v<Vec>>>
  void set_vector_bytes(const Vec& values, int slot) {
    constexpr size_t size = sizeof(typename Vec::value_type);
    set_value(values.data(), values.size() * size, size, slot);
  }
  void add_temporary(array a);
  void dispatch_threads(MTL::Size threads, MTL::Size group);
  void dispatch_threadgroups(MTL::Size groups, MTL::Size group);
  /// As at the end of a command buffer: what it used may be freed, and come again as other memory.
  void forget_hazards();

 private:
  struct Binding {
    enum Kind { nothing, input, output, value } kind = nothing;
    char* begin = nullptr; // of the buffer; the kernel gets begin + offset
    size_t size = 0; // of the buffer
    int64_t offset = 0;
    size_t element = 0;
    std::vector<char> bytes; // of a value
    std::weak_ptr<array::Data> memory; // must live until the dispatch runs
  };

  void bind(const array& a, int slot, int64_t offset, Binding::Kind kind);
  void set_value(const void* data, size_t size, size_t element, int slot);
  Binding& binding(int slot);
  void check(const MTL::Size& threads, const MTL::Size& group) const;
  bool takes_barrier();

  Stream stream_;
  MTL::ComputePipelineState* pipeline_ = nullptr;
  std::array<Binding, metal_on_cpu::kSlots> bindings_;

  // MLX's rule for barriers, by buffer: one goes before a dispatch that touches
  // an earlier output, or writes an earlier input; except that the outputs of a
  // concurrent group count only once it has ended, and its writes do not ask.
  bool needs_barrier_ = false;
  bool concurrent_ = false;
  bool group_begins_ = false;
  std::set<const void*> earlier_inputs_, earlier_outputs_;
  std::set<const void*> inputs_, outputs_, concurrent_outputs_, read_before_group_;
};

class Device {
 public:
  MTL::Library* get_library(
      const std::string& name,
      const CompileOptions& options,
      const std::function<std::string(void)>& builder);
  MTL::ComputePipelineState* get_kernel(
      const std::string& name,
      MTL::Library* library,
      const std::string& cached_as = "",
      const MTLFCList& constants = {});

 private:
  std::map<std::string, MTL::Library> libraries_;
  std::map<std::string, std::unique_ptr<MTL::ComputePipelineState>> pipelines_;
};

Device& device(mlx::core::Device);
CommandEncoder& get_command_encoder(Stream s);

} // namespace mlx::core::metal
