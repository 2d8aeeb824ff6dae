// The CPU kernel of a step: the loop over a block is csrc/math's element on vectors. Each
// build of this file has its own instruction set, which ISA names.
#include "cpu/blocks.h"
#include "cpu/bytes.h"

namespace mlx_fused_optim::cpu {
namespace {

using fused_math::kSlots;
using fused_math::StepElements;
using fused_math::StepHyper;

// The loop goes by cache lines of float32 and asks for the one that it will want
// kAhead elements later. The hardware's prefetchers stop at every page, and five
// streams cross many of them.
constexpr size_t kLine = 16;
constexpr size_t kAhead = 128;

/// Where a block is read from and written to, as float32; slots are null where absent.
struct Block {
  const float* parameter;
  const float* gradient;
  const float* slots[kSlots];
  float* parameter_out;
  float* slots_out[kSlots];
  uint32_t position; // of its first element in the arena
};

/// Whether there is an array for a slot. Of a plain step its form says so, where this is
/// compiled; a tensor of another one may be without what the arena has.
__attribute__((always_inline)) inline bool keeps(const Block& block, Form form, int slot) {
  return form.flags & ~fused_math::kPlainFlags ? block.slots[slot] != nullptr
                                               : fused_math::has_slot(form.rule, form.flags, slot);
}

/// Elements [i, i + width of T). An output may be its own input, element for
/// element: everything is read before anything is written.
template <typename T>
__attribute__((always_inline)) inline void update_at(
    const Block& block,
    size_t i,
    const StepHyper& hyper,
    Form form) {
  StepElements<T> e{};
  T gradient;
  load(gradient, block.gradient, i);
  load(e.parameter, block.parameter, i);
  T* const kept[kSlots] = {
      &e.slots.of[0], &e.slots.of[1], &e.slots.of[2], &e.master, &e.compensation, &e.average};
#pragma GCC unroll 6
  for (int slot = 0; slot < kSlots; ++slot) {
    if (keeps(block, form, slot)) {
      load(*kept[slot], block.slots[slot], i);
    }
  }
  e = fused_math::step_element(
      e,
      gradient,
      positions<T>(block.position + static_cast<uint32_t>(i)),
      hyper,
      form.rule,
      form.flags,
      form.parameter_format,
      form.state_format);
  store(block.parameter_out, i, e.parameter);
#pragma GCC unroll 6
  for (int slot = 0; slot < kSlots; ++slot) {
    if (keeps(block, form, slot)) {
      store(block.slots_out[slot], i, *kept[slot]);
    }
  }
}

/// A step of a form that is known where this is compiled, but for what it calls.
__attribute__((always_inline)) inline void update_block(
    const Block& given,
    size_t n,
    const StepHyper& given_hyper,
    Form form) {
  const Block block = given; // in registers: what is stored could be its memory
  const StepHyper hyper = given_hyper;
  size_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    __builtin_prefetch(block.parameter + i + kAhead);
    __builtin_prefetch(block.gradient + i + kAhead);
#pragma GCC unroll 6
    for (int slot = 0; slot < kSlots; ++slot) {
      if (keeps(block, form, slot)) {
        __builtin_prefetch(block.slots[slot] + i + kAhead);
      }
    }
    for (size_t j = i; j < i + kLine; j += kWidth) {
      update_at<Vector>(block, j, hyper, form);
    }
  }
  for (; i < n; ++i) {
    update_at<float>(block, i, hyper, form);
  }
}

/// The frame with nothing in it: what is narrower than float32 is rounded when it is stored.
template <uint32_t rule, uint32_t flags>
void update_plain(const Block& block, size_t n, const StepHyper& hyper) {
  update_block(block, n, hyper, {rule, flags, fused_math::kFloat32, fused_math::kFloat32});
}

template <uint32_t rule>
void update_any(const Block& block, size_t n, const StepHyper& hyper, Form form) {
  form.rule = rule;
  update_block(block, n, hyper, form);
}

/// The plain flags of kernel `n`. Those that say nothing to the rule make no kernel of
/// their own.
template <uint32_t rule>
constexpr uint32_t plain_flags(uint32_t n) {
  using namespace fused_math;
  return (n & Rules::flags(rule)) | (n & kWeightDecay) |
      ((n & kWeightDecay) && (n & 8) ? kDecoupled : 0);
}

/// 0, 1, ..., count - 1: <utility> is not for here, see cpu/kernel.h.
template <uint32_t... numbers>
struct Sequence {};
template <uint32_t count, uint32_t... numbers>
struct SequenceTo : SequenceTo<count - 1, count - 1, numbers...> {};
template <uint32_t... numbers>
struct SequenceTo<0, numbers...> {
  using type = Sequence<numbers...>;
};

template <uint32_t rule, typename Kernels = SequenceTo<16>::type>
struct PlainUpdates;
template <uint32_t rule, uint32_t... n>
struct PlainUpdates<rule, Sequence<n...>> {
  static constexpr decltype(&update_plain<rule, 0>) of[] = {
      update_plain<rule, plain_flags<rule>(n)>...};
};

template <uint32_t rule>
void update_of(const Block& block, size_t n, const StepHyper& hyper, Form form) {
  using namespace fused_math;
  if (form.flags & ~kPlainFlags) {
    update_any<rule>(block, n, hyper, form);
  } else {
    PlainUpdates<rule>::of[(form.flags & 7) | (form.flags & kDecoupled ? 8 : 0)](block, n, hyper);
  }
}

template <typename Rules = SequenceTo<fused_math::Rules::kCount>::type>
struct Updates;
template <uint32_t... rule>
struct Updates<Sequence<rule...>> {
  static constexpr decltype(&update_of<0>) of[] = {update_of<rule>...};
};

/// Where the elements from `at` on are to be computed: in their own memory, or in
/// `buffer` to be narrowed.
float* place(Type type, void* data, size_t at, float* buffer) {
  return type == Type::float32 ? static_cast<float*>(data) + at : buffer;
}

/// Whether all that is read is float32 in a row: then there is no buffer to fill.
bool is_direct(const Arenas& arenas, const Tensor& tensor) {
  auto direct = [](const Source& source) {
    return !source.data || (source.type == Type::float32 && !source.strided);
  };
  bool all = direct(tensor.parameter) && direct(tensor.gradient);
  for (auto& slot : arenas.slots) {
    all = all && direct(slot);
  }
  return all;
}

} // namespace

void KERNEL(update)(
    const Arenas& arenas,
    const Tensor& tensor,
    size_t begin,
    size_t end,
    StepHyper hyper,
    Form form) {
  alignas(64) float parameter[kBlock], gradient[kBlock], slots[kSlots][kBlock];
  const Type type = arenas.parameter_out_type;
  const size_t step = is_direct(arenas, tensor) ? end - begin : kBlock;
  for (; begin < end; begin += step) {
    const size_t n = end - begin < step ? end - begin : step;
    const size_t at = tensor.position + begin; // in the arenas
    Block block{};
    block.parameter = read(tensor.parameter, begin, n, parameter);
    block.gradient = read(tensor.gradient, begin, n, gradient);
    block.parameter_out = place(type, arenas.parameter_out, at, parameter);
    for (int slot = 0; slot < kSlots; ++slot) {
      auto& source = arenas.slots[slot];
      if (source.data) {
        block.slots[slot] = is_bytes(source.type) ? read_bytes(source, at, n, slots[slot])
                                                  : read(source, at, n, slots[slot]);
        block.slots_out[slot] = place(source.type, arenas.slots_out[slot], at, slots[slot]);
      }
    }
    block.position = static_cast<uint32_t>(at);

    Updates<>::of[form.rule](block, n, hyper, form);

    if (type != Type::float32) {
      write(type, arenas.parameter_out, at, n, block.parameter_out);
    }
    for (int slot = 0; slot < kSlots; ++slot) {
      auto& source = arenas.slots[slot];
      if (!source.data || source.type == Type::float32) {
        continue;
      }
      void* out = arenas.slots_out[slot];
      if (!is_bytes(source.type)) {
        write(source.type, out, at, n, block.slots_out[slot]);
      } else if (hyper.apply && fused_math::has_slot(form.rule, form.flags, slot)) {
        write_bytes(source.type, out, at, n, slots[slot], slot, hyper.key, form.flags);
      } else { // to the bit
        copy_rows(source.data, out, at, n);
      }
    }
  }
}

} // namespace mlx_fused_optim::cpu
