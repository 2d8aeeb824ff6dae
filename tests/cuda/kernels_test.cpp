// The kernels of a step and of the measurement without a GPU: random tensors are
// packed as the host packs them, the kernels are run by emulation.h, and every bit is
// compared with csrc/math taken one element after another. Prints "ok" and the numbers
// of elements, or says what is wrong and fails.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>

#include "emulation.h"

#include "../../cuda/kernels.cu"
#include "cuda/batches.h"
#include "cuda/measure_batches.h"

using namespace mlx_fused_optim::cuda;
using namespace fused_math;

namespace {

void require(bool truth, const std::string& what) {
  if (!truth) {
    std::printf("wrong: %s\n", what.c_str());
    std::exit(1);
  }
}

std::mt19937 engine{1};
int below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(engine); }
float normal() { return std::normal_distribution<float>()(engine); }

/// Some memory of one type, that begins at an address that is `shift` elements odd.
struct Memory {
  Type type;
  size_t shift;
  std::vector<uint4> words;

  Memory(Type t, size_t size, size_t by = 0) : type(t), shift(by), words((size + by) / 4 + 1) {}

  char* data() { return reinterpret_cast<char*>(words.data()) + shift * size_of(type); }
  uint32_t bits(size_t at) {
    uint32_t bits = 0;
    std::memcpy(&bits, data() + at * size_of(type), size_of(type));
    return bits;
  }
  void set_bits(size_t at, uint32_t bits) {
    std::memcpy(data() + at * size_of(type), &bits, size_of(type));
  }
  float get(size_t at) {
    return type == Type::float32 ? bits_to_float(bits(at))
        : type == Type::float16  ? float_of_half(static_cast<uint16_t>(bits(at)))
        : type == Type::int8     ? static_cast<int8_t>(bits(at))
                                 : bits_to_float(bits(at) << 16);
  }
  void set(size_t at, float x) {
    set_bits(
        at,
        type == Type::float32       ? float_to_bits(x)
            : type == Type::float16 ? half_of_float(x)
            : type == Type::int8    ? static_cast<int8_t>(x)
                                    : float_to_bits(nearest_bfloat16(x)) >> 16);
  }
  size_t size() const { return (words.size() * 16 - shift * size_of(type)) / size_of(type); }
  void fill(bool any_bits = false, float factor = 1) {
    for (size_t i = 0; i < size(); ++i) {
      any_bits || type == Type::int8 ? set_bits(i, engine()) : set(i, normal() * factor);
    }
  }
};

// ---- Rows of bytes, a group at a time ---------------------------------------------

/// Memory of as many elements in rows: bytes, to be compared as they are.
Memory rows_of(uint64_t elements) { return {Type::int8, elements / kByteGroup * kByteRow}; }

float row_value(Memory& rows, uint64_t at, uint32_t format) {
  const char* row = rows.data() + at / kByteGroup * kByteRow;
  float scale;
  std::memcpy(&scale, row, sizeof(scale));
  const auto byte = static_cast<uint8_t>(row[kByteScale + at % kByteGroup]);
  const float code = format == kByteSquares ? byte : static_cast<int8_t>(byte);
  return byte_value(code, scale, format);
}

/// The group that begins at element `at`, of `count` values.
template <typename Dither>
void set_row(
    Memory& rows,
    uint64_t at,
    const float* values,
    size_t count,
    uint32_t format,
    Dither dither) {
  uint32_t peak = 0;
  for (size_t i = 0; i < count; ++i) {
    peak = std::max(peak, byte_peak(values[i], format));
  }
  const ByteScale scale = byte_scale(peak, format);
  char* row = rows.data() + at / kByteGroup * kByteRow;
  std::memcpy(row, &scale.scale, kByteScale);
  for (size_t i = 0; i < count; ++i) {
    const float code = byte_code(values[i], scale, dither(at + i), format) - integer_base();
    row[kByteScale + i] = static_cast<char>(static_cast<int>(code));
  }
}

void fill_rows(Memory& rows, uint64_t elements, uint32_t format, bool special) {
  for (uint64_t at = 0; at < elements; at += kByteGroup) {
    float values[kByteGroup];
    const float scale = std::ldexp(1.0f, below(20) - 10);
    for (float& x : values) {
      x = normal() * scale * (below(5) ? 1.0f : 1e-4f) * (below(4) ? 1.0f : 0.0f);
      x = special && below(20) == 0 ? NAN : format == kByteSquares ? x * x : x;
    }
    set_row(rows, at, values, kByteGroup, format, [](uint64_t) { return 0.0f; });
  }
}

/// An array with strides in memory of its own, or in an arena.
struct Array {
  std::shared_ptr<Memory> memory;
  int64_t first = 0;
  std::vector<int64_t> strides;
  bool contiguous = true;

  Source source() {
    auto* data = memory->data() + first * static_cast<int64_t>(size_of(memory->type));
    return {data, memory->type, contiguous, strides.data()};
  }
};

int64_t place(const std::vector<int32_t>& shape, const std::vector<int64_t>& strides, int64_t i) {
  int64_t at = 0;
  for (int d = shape.size() - 1; d >= 0; --d) {
    at += i % shape[d] * strides[d];
    i /= shape[d];
  }
  return at;
}

enum class Lying { contiguous, dense, any };

Array random_array(const std::vector<int32_t>& shape, Type type, Lying way) {
  const int n = shape.size();
  std::vector<int> order(n);
  for (int d = 0; d < n; ++d) {
    order[d] = d;
  }
  if (way != Lying::contiguous) {
    std::shuffle(order.begin(), order.end(), engine);
  }
  Array a;
  a.strides.resize(n);
  int64_t stride = 1;
  for (int k = n - 1; k >= 0; --k) {
    const int d = order[k];
    a.strides[d] = way == Lying::any && below(5) == 0 ? 0 : stride;
    stride *= shape[d] + (way == Lying::any && below(3) == 0);
    if (way == Lying::any && a.strides[d] && below(5) == 0) { // backwards
      a.first += a.strides[d] * (shape[d] - 1);
      a.strides[d] = -a.strides[d];
    }
  }
  int64_t expected = 1;
  for (int d = n - 1; d >= 0; --d) {
    a.contiguous &= shape[d] == 1 || a.strides[d] == expected;
    expected *= shape[d];
  }
  a.memory = std::make_shared<Memory>(type, stride + 8, below(4));
  return a;
}

/// All axes turned round; of two axes, the gradient of x @ W.T.
Array turned_array(const std::vector<int32_t>& shape, Type type) {
  Array a;
  a.contiguous = false;
  int64_t stride = 1;
  for (const int32_t length : shape) {
    a.strides.push_back(stride);
    stride *= length + kQuad * below(2);
  }
  a.memory = std::make_shared<Memory>(type, stride);
  return a;
}

Array contiguous_copy(Array& a, const std::vector<int32_t>& shape) {
  Array copy = random_array(shape, a.memory->type, Lying::contiguous);
  for (uint64_t e = 0; e < element_count(shape.size(), shape.data()); ++e) {
    copy.memory->set_bits(e, a.memory->bits(a.first + place(shape, a.strides, e)));
  }
  return copy;
}

std::vector<int32_t> random_shape() {
  std::vector<int32_t> shape(below(5));
  for (auto& length : shape) {
    const int longest[] = {2, 9, 40};
    length = 1 + below(longest[below(3)]);
  }
  switch (below(6)) { // more than a tile, in one or two dimensions
    case 0:
      return {4090 + below(12)};
    case 1:
      return {250 + below(12), 1 + below(40)};
    default:
      return shape;
  }
}

template <typename T>
void run_all(
    BatchList<T>& batches,
    const typename T::Shared& common,
    void (*kernel)(const Launch<T>&),
    uint32_t threads = kThreads,
    void (*kernel_for_few)(const Launch<T, 32>&) = nullptr) {
  for (auto& batch : batches) {
    auto& launch = batch->arguments;
    const uint32_t count = launch.common.count;
    launch.common = common;
    launch.common.count = count;
    std::function<void()> run = [&] { kernel(launch); };
    Launch<T, 32> few; // how the whole begins, as the driver copies it
    if (kernel_for_few && capacity_for<T>(count) == 32) {
      std::memcpy(static_cast<void*>(&few), &launch, sizeof(few));
      run = [&] { kernel_for_few(few); };
    }
    for (uint32_t block = 0; block < batch->blocks; ++block) {
      emulation::run_block(block, threads, run);
    }
  }
}

// ---- The step -------------------------------------------------------------------

/// What a step may consist of, and the kernels that are compiled for just that.
struct Tested {
  uint32_t rule;
  Type type, state;
  uint32_t gradients, flags;
  void (*tiled)(const Launch<Tiled>&);
  void (*turned)(const Launch<Turned>&);
  void (*strided)(const Launch<Strided>&);
  void (*tiled_few)(const Launch<Tiled, 32>&);
  void (*turned_few)(const Launch<Turned, 32>&);
  void (*strided_few)(const Launch<Strided, 32>&);
};

template <typename Rule, typename... All>
constexpr uint32_t number_of(RuleList<All...>) {
  uint32_t number = 0;
  static_cast<void>(((std::is_same_v<Rule, All> || !++number) || ...));
  return number;
}

template <typename Rule, typename P, typename S, uint32_t gradients, uint32_t flags>
constexpr Tested tested() {
  constexpr uint32_t rule = number_of<Rule>(Rules());
  using K = Known<rule, P, S, gradients, flags>;
  return {
      rule,
      static_cast<Type>(kFormatOf<P>),
      static_cast<Type>(kFormatOf<S>),
      gradients,
      flags,
      run<K>,
      run<K>,
      run<K>,
      run<K>,
      run<K>,
      run<K>};
}

constexpr uint32_t kF32 = bit_of(Type::float32), kF16 = bit_of(Type::float16),
                   kBF16 = bit_of(Type::bfloat16);
constexpr uint32_t kFrame = kWeightDecay | kMaximize | kGradScale | kClipValue | kClipNorm |
    kSkipNonfinite | kTrustRatio | kGroups | kDecoupled;
constexpr uint32_t kWithMomentum = Sgd::kMomentum, kWithNesterov = Sgd::kFlags,
                   kCorrected = Adam::kBiasCorrection, kCorrectedLargest = Adam::kFlags;
constexpr Tested kTested[] = {
    tested<Sgd, float32, float32, kF32, 0>(),
    tested<Sgd, bfloat16, bfloat16, kBF16, kWithNesterov | kWeightDecay>(),
    tested<Sgd, float16, float16, kF16, kWithNesterov | kFrame | kCompensated>(),
    tested<Sgd, bfloat16, float16, kF32, kWithMomentum | kCompensated | kStochastic | kAverage>(),
    tested<Adam, float32, float32, kF32, kCorrected | kWeightDecay | kDecoupled>(),
    tested<Adam, float32, bfloat16, kF32 | kBF16, kCorrectedLargest | kFrame>(),
    tested<Adam, bfloat16, bfloat16, kBF16, kMaster | kSkipNonfinite>(),
    tested<
        Adam,
        float16,
        float16,
        kF16,
        kCorrectedLargest | kFrame | kMaster | kStochastic | kAverage>(),
    tested<Adamax, bfloat16, float32, kBF16, kMaster | kAverage | kGroups | kWeightDecay>(),
    tested<Lion, bfloat16, bfloat16, kBF16, kWeightDecay | kDecoupled | kStochastic>(),
    tested<Rmsprop, float16, float32, kAnyType, kClipNorm | kCompensated>(),
    tested<Adagrad, float32, float16, kF32, kTrustRatio | kStochastic>(),
    tested<Adadelta, float16, bfloat16, kBF16, kMaster | kSkipNonfinite | kWeightDecay>(),
    tested<Adam, bfloat16, float32, kBF16, kCorrected | kMaster24 | kWeightDecay>(),
    tested<Lion, bfloat16, bfloat16, kBF16 | kF32, kFrame | kMaster24 | kStochastic | kAverage>(),
    tested<Adam, bfloat16, bytes, kBF16, kCorrectedLargest | kMaster24 | kWeightDecay>(),
    tested<Sgd, float32, bytes, kF32, kWithMomentum | kFrame | kStochastic>(),
    tested<Adadelta, float16, bytes, kAnyType, kAverage | kGroups | kStochastic>(),
    // The first half of a step: directions in float32.
    tested<
        Muon,
        bfloat16,
        bfloat16,
        kBF16 | kF32,
        kWithNesterov | kFrame | kStochastic | kDirection>(),
    tested<Muon, float16, float32, kF16, kWithNesterov | kDirection>(),
    // A step with more than a process may have kernels for (csrc/cuda/kernels.cpp).
    tested<Adam, bfloat16, float32, kAnyType, kGenericFlags>(),
    tested<Sgd, bfloat16, float32, kAnyType, kGenericMaster24Flags>(),
};
constexpr int kTestedCount = std::size(kTested);

/// Flags of a step that the kernel serves.
uint32_t random_flags(const Tested& kernel) {
  if (!is_generic(kernel.flags)) {
    return kernel.flags;
  }
  const uint32_t flags = engine() & (kMeasureNorm - 1);
  if (kernel.flags == kGenericMaster24Flags) {
    return flags | kMaster24;
  }
  return flags &
      (kernel.type == Type::float32 ? ~(kMaster | kCompensated)
           : flags & kMaster        ? ~kCompensated
                                    : ~0u);
}

Type random_type(uint32_t types) {
  for (;;) {
    const auto type = static_cast<Type>(below(3));
    if (bit_of(type) & types) {
      return type;
    }
  }
}

/// Numbers at which formats end.
void add_special(Memory& memory) {
  const float special[] = {
      0.0f,
      -0.0f,
      INFINITY,
      -INFINITY,
      NAN,
      -NAN,
      bits_to_float(0x7f800001), // signalling, and below what bfloat16 keeps
      bits_to_float(0xffa00000),
      1e-45f,
      -1e-40f,
      6e-8f,
      -3e-5f,
      65504.0f,
      65520.0f,
      -3.4e38f};
  for (size_t i = 0; i + 1 < memory.words.size() * 16 / size_of(memory.type) - memory.shift;
       i += 1 + below(9)) {
    memory.set(i, special[below(std::size(special))]);
  }
}

/// The bits, or another NaN: of two, which one an addition keeps is the compiler's choice.
bool is_same(Memory& a, Memory& b, size_t at) {
  const float x = a.get(at), y = b.get(at);
  return a.bits(at) == b.bits(at) || (x != x && y != y);
}

struct TestTensor {
  std::vector<int32_t> shape;
  uint64_t size, offset;
  int arena;
  uint32_t flags;
  bool turns; // turned_array
  Array parameter, gradient;
};

/// A slot before and after, which may be the same; `stride` is between elements.
struct TestSlot {
  std::shared_ptr<Memory> before, after;
  int64_t stride = 1;
  uint32_t format;
};

struct TestArena {
  uint64_t size = 0, place = 0;
  std::shared_ptr<Memory> parameters, out; // the same, but of directions
  TestSlot slots[kSlots];
  bool contiguous = true; // its slots
  std::vector<Memory> expected; // the parameters, and each slot
};

struct Counted {
  size_t tiled[kTestedCount] = {}, turned[kTestedCount] = {}, strided[kTestedCount] = {};
  size_t elements = 0, copied = 0, arenas = 0; // the last of the round with most
};

void test_step(int round, Counted& counted) {
  const Tested& kernel = kTested[round % kTestedCount];
  const Type type = kernel.type;
  const uint32_t flags = random_flags(kernel);
  // First in place and at even addresses, so that every kernel is met.
  const int pass = round / kTestedCount;
  const bool has_bytes = kernel.state == Type::bytes;
  const bool skips = flags & kSkipNonfinite && below(3) == 0, in_place = pass % 2 == 0,
             special = round % 3 == 1;

  Common common{};
  common.control.rule = kernel.rule;
  common.control.flags = flags;
  common.control.given = (1 << kFirstRuleScalar) - 1;
  common.control.seed = engine();
  common.control.place = engine(); // of no arena
  common.control.begin = kPlace * below(1000); // of the first
  for (int i = 0; i < kRuleScalars; ++i) { // a few are given, the others constant
    common.control.given |= below(3) == 0 ? 1 << (kFirstRuleScalar + i) : 0;
    common.control.constants[kFirstRuleScalar + i] = {0.9f, 1e-9f};
    common.control.rest[i] = 0.1f;
  }
  common.control.clip_value = 0.5f;
  common.control.clip_norm = 3.0f;
  common.control.trust_coefficient = 0.01f;
  common.control.average_weight = 0.125f;
  common.control.parameter_format = static_cast<uint32_t>(type);
  common.control.state_format = static_cast<uint32_t>(kernel.state);
  const uint64_t step = 41;
  const float given[kScalars] = {0.1f, 0.01f, 4.0f, 0.8f, 0.95f, 0.01f};
  std::vector<float> measured = {5.0f, skips ? 0.0f : 1.0f}, groups;
  const bool counts = skips || (flags & kStochastic) ||
      Rules::is_bias_corrected(kernel.rule, flags) || below(2); // else it needs no step
  common.step = counts ? &step : nullptr;
  common.given = given;

  const int tensors = 3 + below(6);
  std::vector<TestTensor> all(tensors);
  std::vector<TestArena> arenas(1);
  const uint64_t granule = kGranule / size_of(type);
  for (auto& t : all) {
    // Always one for each kernel, if addresses allow.
    const auto number = &t - all.data();
    t.turns = number < 2;
    t.shape = random_shape();
    if (number == 0) {
      // With bytes, rows of whole groups.
      const int columns = has_bytes ? int(kByteGroup) : 4;
      t.shape = {4 * (1 + below(20)), columns * (1 + below(columns > 4 ? 3 : 20))};
    } else if (number == 1) {
      t.shape = {2 + below(7), 2 + below(7), 2 + below(7)};
    } else if (number == 2) {
      t.shape = {1 + below(3000)};
    }
    t.size = element_count(t.shape.size(), t.shape.data());
    if (number > 0 && below(pass % 3 + 1) > 0) { // in some rounds all are in one
      arenas.emplace_back();
    }
    t.arena = arenas.size() - 1;
    t.offset = arenas.back().size;
    t.flags = flags & (flags & kGroups ? engine() | ~kTensorFlags : ~0u);
    arenas.back().size += divide_up(t.size, granule) * granule;
    measured.insert(measured.end(), {std::abs(normal()), std::abs(normal())});
    for (uint32_t i = 0; i < kGroupNumbers; ++i) {
      // Scalars stay between 0 and 1.
      groups.push_back(i < kFirstScalarTimes ? normal() : 0.5f * std::abs(std::sin(normal())));
    }
  }
  common.measured = measured.data();
  common.groups = groups.data();

  // Arenas, some of them at odd addresses.
  auto fill = [&](Memory& memory) {
    memory.fill(skips);
    if (special && !skips && memory.type != Type::int8) {
      add_special(memory);
    }
  };
  for (auto& arena : arenas) {
    const size_t shift = pass > 0 && below(2);
    arena.place = engine();
    arena.parameters = std::make_shared<Memory>(type, arena.size, shift);
    arena.out = arena.parameters;
    if (flags & kDirection) {
      arena.out = std::make_shared<Memory>(Type::float32, arena.size);
      arena.out->fill();
    }
    arena.expected.emplace_back(arena.out->type, arena.size);
    fill(*arena.parameters);
    for (int slot = 0; slot < kSlots; ++slot) {
      auto& s = arena.slots[slot];
      s.format = slot_format(
          kernel.rule,
          flags,
          slot,
          static_cast<uint32_t>(type),
          static_cast<uint32_t>(kernel.state));
      const bool is_rows = is_byte_format(s.format);
      const auto slot_type = static_cast<Type>(s.format);
      arena.expected.push_back(is_rows ? rows_of(arena.size) : Memory(slot_type, arena.size));
      if (!has_slot(kernel.rule, flags, slot)) {
        continue;
      }
      s.stride = !in_place && !has_bytes && below(6) == 0 ? 2 : 1;
      arena.contiguous &= s.stride == 1;
      if (is_rows) {
        s.before = std::make_shared<Memory>(
            Type::int8, arena.size / kByteGroup * kByteRow, shift * below(4));
        fill_rows(*s.before, arena.size, s.format, special);
      } else {
        s.before = std::make_shared<Memory>(slot_type, s.stride * arena.size, shift);
        fill(*s.before);
      }
      s.after = in_place ? s.before
          : is_rows      ? std::make_shared<Memory>(rows_of(arena.size))
                         : std::make_shared<Memory>(slot_type, arena.size);
      if (!in_place) {
        s.after->fill();
      }
    }
  }

  Batches batches(type, has_bytes);
  int begun = 0;
  for (int i = 0; i < tensors; ++i) {
    auto& t = all[i];
    auto& arena = arenas[t.arena];
    for (; begun <= t.arena; ++begun) {
      SlotWays ways;
      for (int slot = 0; slot < kSlots; ++slot) {
        const int64_t stride = arena.slots[slot].stride;
        const bool is_matrix = arena.size > granule;
        ways[slot] = stride == 1
            ? kContiguousWay
            : SlotWay{
                  is_matrix ? granule : arena.size, static_cast<int64_t>(granule) * stride, stride};
      }
      batches.begin_arena(ways);
    }
    const auto gradient_type = random_type(kernel.gradients);
    t.gradient = t.turns ? turned_array(t.shape, gradient_type)
                         : random_array(t.shape, gradient_type, static_cast<Lying>(below(3)));
    t.gradient.memory->fill();
    for (size_t i = 0; has_bytes && i < t.gradient.memory->size(); i += 1 + below(8)) {
      t.gradient.memory->set_bits(i, 0); // a square of 0 beside others stays one
    }
    if (special) {
      add_special(*t.gradient.memory);
    }
    if (in_place) {
      t.parameter = random_array(t.shape, type, Lying::contiguous);
      t.parameter.memory = arena.parameters;
      t.parameter.first = t.offset;
    } else {
      t.parameter =
          random_array(t.shape, type, below(4) ? Lying::contiguous : static_cast<Lying>(below(3)));
      fill(*t.parameter.memory);
    }
    const auto number = static_cast<uint32_t>(i);
    auto add = [&] {
      return batches.add(
          t.shape.size(),
          t.shape.data(),
          {t.offset, number, number, t.flags},
          t.parameter.source(),
          t.gradient.source());
    };
    if (!add()) {
      require(has_bytes, "a tensor was not added");
      t.parameter = t.parameter.contiguous ? t.parameter : contiguous_copy(t.parameter, t.shape);
      t.gradient = contiguous_copy(t.gradient, t.shape);
      require(add(), "a contiguous tensor was not added");
      ++counted.copied;
    }
  }

  // What is expected, from the formulas alone.
  for (int i = 0; i < tensors; ++i) {
    auto& t = all[i];
    auto& slots = arenas[t.arena].slots;
    auto& expected = arenas[t.arena].expected;
    auto control = common.control;
    control.place = arenas[t.arena].place;
    control.begin = t.arena == 0 ? common.control.begin : 0;
    const auto hyper = step_hyper(control, step, common.given, common.measured);
    const auto own = step_tensor_hyper(
        common.control,
        hyper,
        kernel.rule,
        step,
        t.flags,
        groups.data() + i * kGroupNumbers,
        measured.data() + kMeasuredTensors + 2 * i);
    std::vector<float> in_bytes[kRuleSlots]; // what a slot becomes, where it changes
    for (uint64_t e = 0; e < t.size; ++e) {
      const uint64_t at = t.offset + e;
      const int64_t from = t.parameter.first + place(t.shape, t.parameter.strides, e);
      const int64_t g = t.gradient.first + place(t.shape, t.gradient.strides, e);
      float values[kSlots] = {};
      for (int slot = 0; slot < kSlots; ++slot) {
        auto& s = slots[slot];
        if (s.before && is_byte_format(s.format)) {
          values[slot] = row_value(*s.before, at, s.format);
          const uint64_t row = at / kByteGroup * kByteRow;
          std::memcpy(expected[1 + slot].data() + row, s.before->data() + row, kByteScale);
          const uint64_t code = row + kByteScale + at % kByteGroup;
          expected[1 + slot].set_bits(code, s.before->bits(code));
        } else if (s.before) {
          values[slot] = s.before->get(at * s.stride);
          expected[1 + slot].set_bits(at, slots[slot].before->bits(at * slots[slot].stride));
        }
      }
      if (!(flags & kDirection)) { // what a skipped direction is nobody asks
        expected[0].set_bits(at, t.parameter.memory->bits(from));
      }
      if (skips) {
        continue;
      }
      const StepElement result = step_element<float>(
          {t.parameter.memory->get(from),
           {{values[0], values[1], values[2]}},
           values[kMasterCopy],
           values[kCompensation],
           values[kMovingAverage]},
          t.gradient.memory->get(g),
          static_cast<uint32_t>(at),
          own,
          kernel.rule,
          t.flags,
          common.control.parameter_format,
          common.control.state_format);
      expected[0].set(at, result.parameter);
      const auto& of = result.slots.of;
      const float after[] = {
          of[0], of[1], of[2], result.master, result.compensation, result.average};
      for (int slot = 0; slot < kSlots; ++slot) {
        if (slots[slot].before && !is_byte_format(slots[slot].format)) {
          expected[1 + slot].set(at, after[slot]);
        } else if (slots[slot].before && has_slot(kernel.rule, t.flags, slot)) {
          in_bytes[slot].push_back(after[slot]);
        }
      }
    }
    for (int slot = 0; slot < kRuleSlots; ++slot) {
      auto dither = [&](uint64_t at) {
        return slot_dither<float>(static_cast<uint32_t>(at), slot, own.key, t.flags);
      };
      const auto& values = in_bytes[slot];
      for (size_t e = 0; e < values.size(); e += kByteGroup) {
        const size_t count = std::min<size_t>(kByteGroup, values.size() - e);
        set_row(expected[1 + slot], t.offset + e, &values[e], count, slots[slot].format, dither);
      }
    }
    counted.elements += t.size;
  }

  for (size_t a = 0; a < arenas.size(); ++a) {
    auto& arena = common.arenas[a];
    bool aligned = is_aligned(arenas[a].out->data(), 16);
    arena.parameters_out = arenas[a].out->data();
    arena.place = arenas[a].place;
    for (int slot = 0; slot < kSlots; ++slot) {
      if (auto& s = arenas[a].slots[slot]; s.before) {
        arena.slots[slot] = {s.before->data(), s.after->data()};
        aligned &= is_aligned(s.before->data(), 16) && is_aligned(s.after->data(), 16);
      }
    }
    common.aligned |= uint32_t(aligned) << a;
  }
  uint64_t next = 0;
  float used[kScalars] = {};
  common.step_out = counts ? &next : nullptr;
  common.used_out = used;
  counted.tiled[round % kTestedCount] += batches.tiled.size();
  counted.turned[round % kTestedCount] += batches.turned.size();
  counted.strided[round % kTestedCount] += batches.strided.size();
  const bool few = pass % 2 == 1; // else what is for many serves
  run_all(batches.tiled, common, kernel.tiled, kThreads, few ? kernel.tiled_few : nullptr);
  run_all(batches.turned, common, kernel.turned, kSquareThreads, few ? kernel.turned_few : nullptr);
  run_all(batches.strided, common, kernel.strided, kThreads, few ? kernel.strided_few : nullptr);

  require(next == (!counts ? 0 : skips ? step : step + 1), "the step counter");
  for (int i = 0; counts && i < kScalars; ++i) {
    const bool absent = i == kGradScaleFactor && !(flags & kGradScale);
    const float want = absent           ? 1.0f
        : common.control.given >> i & 1 ? given[i]
                                        : common.control.constants[i].hi;
    require(used[i] == want, "the numbers used");
  }
  for (auto& arena : arenas) {
    for (uint64_t e = 0; e < arena.size; ++e) {
      const auto where = " of element " + std::to_string(e) + ", arena " +
          std::to_string(&arena - arenas.data()) + ", round " + std::to_string(round);
      const bool is_asked = !(skips && flags & kDirection);
      require(!is_asked || is_same(*arena.out, arena.expected[0], e), "the parameter" + where);
      for (int slot = 0; slot < kSlots; ++slot) {
        require(
            !arena.slots[slot].after || is_byte_format(arena.slots[slot].format) ||
                is_same(*arena.slots[slot].after, arena.expected[1 + slot], e),
            "slot " + std::to_string(slot) + where);
      }
    }
    for (int slot = 0; slot < kSlots; ++slot) {
      const bool is_rows = arena.slots[slot].after && is_byte_format(arena.slots[slot].format);
      const uint64_t bytes = is_rows ? arena.size / kByteGroup * kByteRow : 0;
      for (uint64_t b = 0; b < bytes; ++b) {
        require(
            arena.slots[slot].after->bits(b) == arena.expected[1 + slot].bits(b),
            "byte " + std::to_string(b % kByteRow) + " of row " + std::to_string(b / kByteRow) +
                ", slot " + std::to_string(slot) + ", round " + std::to_string(round));
      }
    }
  }
  counted.arenas = std::max(counted.arenas, arenas.size());
}

void test_an_arena_without_tensors_counts_the_step() {
  Batches batches(Type::float32, false);
  batches.begin_arena({});
  batches.add_nothing();
  Common common{};
  common.control.given = (1 << kScalars) - 1;
  const uint64_t step = 41;
  const float given[kScalars] = {0.1f, 0.01f, 4.0f, 0.9f, 0.0f, 0.0f};
  uint64_t next = 0;
  float used[kScalars] = {};
  common.step = &step;
  common.given = given;
  common.step_out = &next;
  common.used_out = used;
  run_all(batches.tiled, common, kTested[0].tiled);
  require(next == 42 && used[0] == 0.1f && used[kGradScaleFactor] == 1.0f, "a step of nothing");
}

/// A kernel that declares `capacity` tensors reads how a launch begins, and every one of them.
template <uint32_t capacity>
void test_a_launch_of() {
  require(capacity_for<Tiled>(capacity) == capacity, "a size that no launch has");
  const int32_t shape[] = {3};
  const int64_t strides[] = {1};
  std::vector<float> parameters(capacity * kPlace), gradients(capacity * kPlace);
  std::generate(parameters.begin(), parameters.end(), normal);
  std::generate(gradients.begin(), gradients.end(), normal);
  SlotWays ways;
  ways.fill(kContiguousWay);
  Batches batches(Type::float32, false);
  batches.begin_arena(ways);
  for (uint32_t t = 0; t < capacity; ++t) {
    auto source = [&](auto& data) {
      return Source{data.data() + t * kPlace, Type::float32, true, strides};
    };
    batches.add(1, shape, {t * kPlace, t, 0, 0}, source(parameters), source(gradients));
  }
  std::vector<float> updated(capacity * kPlace, 7.0f);
  const float given[kScalars] = {0.5f};
  auto& launch = batches.tiled.at(0)->arguments;
  const uint32_t count = launch.common.count;
  launch.common = {};
  launch.common.count = count;
  launch.common.control.given = (1 << kScalars) - 1;
  launch.common.given = given;
  launch.common.arenas[0].parameters_out = updated.data();
  Launch<Tiled, capacity> declared;
  std::memcpy(static_cast<void*>(&declared), &launch, sizeof(declared));
  for (uint32_t block = 0; block < batches.tiled[0]->blocks; ++block) {
    emulation::run_block(block, kThreads, [&] {
      run<Known<number_of<Sgd>(Rules()), float32, float32, kF32, 0>>(declared);
    });
  }
  for (uint32_t i = 0; i < updated.size(); ++i) {
    const float want = i % kPlace < 3 ? parameters[i] - 0.5f * gradients[i] : 0.0f;
    require(updated[i] == want, "element " + std::to_string(i) + " of a launch");
  }
}

/// What is stored where the last rounding is that of memory: all patterns at which a format
/// or a NaN ends, and random ones.
void test_narrowing() {
  for (int round = 0; round < 200000; ++round) {
    float values[kQuad];
    for (float& value : values) {
      const uint32_t ends[] = {
          0x7f7fffff, 0x7f800000, 0x7f800001, 0x7fbfffff, 0x477fefff, 0x33000000};
      value = bits_to_float(
          below(3) ? engine() : (ends[below(6)] + below(3)) ^ (below(2) ? 0x80000000u : 0));
    }
    float rounded[kQuad];
    std::copy(values, values + kQuad, rounded);
    Quad bfloat16, float16, float32;
    round_and_narrow(rounded, kBfloat16, bfloat16);
    std::copy(values, values + kQuad, rounded);
    round_and_narrow(rounded, kFloat16, float16);
    std::copy(values, values + kQuad, rounded);
    round_and_narrow(rounded, kFloat32, float32);
    for (uint32_t k = 0; k < kQuad; ++k) {
      const uint32_t half = k % 2 * 16;
      require(
          (bfloat16.words[k / 2] >> half & 0xffff) ==
              float_to_bits(nearest_bfloat16(values[k])) >> 16,
          "bfloat16");
      require(
          (float16.words[k / 2] >> half & 0xffff) == half_of_float(nearest_float16(values[k])),
          "float16");
      require(float32.words[k] == float_to_bits(values[k]), "float32");
    }
  }
}

// ---- The measurement -------------------------------------------------------------

/// The fold of csrc/math/norm.h, lane by lane.
Squares folded_in_order(const std::vector<Squares>& values) {
  std::vector<Squares> lanes(kFoldLanes, Squares{});
  for (size_t i = 0; i < values.size(); ++i) {
    lanes[i % kFoldLanes] = fold(lanes[i % kFoldLanes], values[i]);
  }
  for (size_t half = kFoldLanes / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) {
      lanes[lane] = fold(lanes[lane], lanes[lane + half]);
    }
  }
  return lanes[0];
}

Squares sum_in_order(
    const std::vector<float>& elements,
    const fused_math::StepHyper& hyper,
    uint32_t flags) {
  std::vector<Squares> chunks;
  for (size_t begin = 0; begin < elements.size(); begin += kChunk) {
    const size_t end = std::min<size_t>(elements.size(), begin + kChunk);
    uint32_t peak = 0;
    for (size_t i = begin; i < end; ++i) {
      peak = peak_of(peak, step_unscaled(elements[i], hyper, flags));
    }
    const uint32_t clipped = step_clipped_peak(peak, hyper, flags);
    float lanes[kLanes] = {};
    for (size_t i = begin; i < end; ++i) {
      const float x = step_clipped(step_unscaled(elements[i], hyper, flags), hyper, flags);
      const float scaled = x * factor_of(clipped);
      lanes[i % kLanes] = lanes[i % kLanes] + scaled * scaled;
    }
    for (uint32_t half = kLanes / 2; half > 0; half /= 2) {
      for (uint32_t lane = 0; lane < half; ++lane) {
        lanes[lane] = lanes[lane] + lanes[lane + half];
      }
    }
    chunks.push_back({{lanes[0], 0}, scale_of(clipped), peak});
  }
  return folded_in_order(chunks);
}

template <uint32_t flags>
using MeasureKnown = Known<0, float32, float32, kAnyType, flags>;

void test_measurement(int round, Counted& counted) {
  MeasureCommon common{};
  common.control.flags = engine() & 0x7fff;
  common.control.given = 1 << kGradScaleFactor;
  common.control.clip_value = 0.5f;
  const uint64_t step = 0;
  // Of a scale of zero, what is behind the end of an array must not become NaN.
  const float given[] = {0, 0, round % 5 == 0 ? 0.0f : 0.3f};
  common.step = &step;
  common.given = given;
  const auto hyper = step_gradient_hyper(common.control, step, common.given);

  const uint32_t tensors = 1 + below(3);
  std::vector<Array> arrays;
  std::vector<Squares> sums;
  MeasureBatches batches;
  for (uint32_t i = 0; i < 2 * tensors; ++i) {
    auto shape = random_shape();
    if (below(4) == 0) {
      shape = {below(2) * 3, static_cast<int>(kChunk * kChunksPerBlock / 3) + below(3)}; // or empty
    }
    const auto way = static_cast<Lying>(below(3));
    auto& a = arrays.emplace_back(random_array(shape, random_type(kAnyType), way));
    a.memory->fill(false, below(2) ? std::ldexp(1.0f, int(below(240)) - 120) : 1.0f);
    const size_t size = element_count(shape.size(), shape.data());
    if (round % 4 == 0 && size > 0) {
      const float infinite = below(2) ? INFINITY : NAN;
      a.memory->set(a.first + place(shape, a.strides, below(size)), infinite);
    }
    const bool is_gradient = i < tensors;
    batches.add(shape.size(), shape.data(), a.source(), is_gradient, way != Lying::any);
    std::vector<float> values;
    for (size_t e = 0; e < size; ++e) {
      const float x = a.memory->get(a.first + (way == Lying::any ? place(shape, a.strides, e) : e));
      values.push_back(x);
    }
    sums.push_back(sum_in_order(values, hyper, is_gradient ? common.control.flags : 0));
    counted.elements += size;
  }

  std::vector<Squares> chunks(batches.chunks());
  std::vector<Squares> array_sums(batches.arrays());
  std::vector<float> measured(2 + 2 * tensors, -1.0f);
  common.chunks = chunks.data();
  // Compiled for these options; the scale is there or not, and likewise the limit.
  const uint32_t flags = common.control.flags & (kGradScale | kClipValue);
  auto measure = [&]<uint32_t known>() {
    if (flags == known) {
      run_all(batches.dense, common, run<MeasureKnown<known>>);
      run_all(batches.sparse, common, run<MeasureKnown<known>>);
    }
  };
  measure.operator()<0>();
  measure.operator()<kGradScale>();
  measure.operator()<kClipValue>();
  measure.operator()<kGradScale | kClipValue>();
  auto folds = std::make_unique<FoldLaunch>();
  folds->chunks = chunks.data();
  folds->sums = array_sums.data();
  folds->norms = measured.data() + kMeasuredTensors;
  folds->gradient_count = tensors;
  folds->first_array = 0;
  std::copy(batches.first_chunk.begin(), batches.first_chunk.end(), folds->first_chunk);
  for (uint32_t a = 0; a < batches.arrays(); ++a) {
    emulation::run_block(a, kFoldLanes, [&] { run<MeasureKnown<0>>(*folds); });
  }
  const uint64_t skipped = 7;
  uint64_t skipped_out = 0;
  const FinishLaunch finish{
      array_sums.data(), &skipped, measured.data(), &skipped_out, tensors, common.control.flags};
  emulation::run_block(0, kFoldLanes, [&] { run<MeasureKnown<0>>(finish); });

  auto same = [](float a, float b) {
    return float_to_bits(a) == float_to_bits(b) || (a != a && b != b);
  };
  const auto where = ", round " + std::to_string(round);
  const auto total = folded_in_order({sums.begin(), sums.begin() + tensors});
  const float norm = norm_of(total);
  const bool applies = step_applies(common.control.flags, total, norm);
  require(same(measured[kMeasuredNorm], norm), "the global norm" + where);
  require(measured[kMeasuredApply] == (applies ? 1.0f : 0.0f), "whether it applies" + where);
  require(skipped_out == skipped + !applies, "the steps skipped" + where);
  for (uint32_t t = 0; t < tensors; ++t) {
    const float* norms = &measured[kMeasuredTensors + 2 * t];
    require(same(norms[0], norm_of(sums[t])), "the norm of a gradient" + where);
    require(same(norms[1], norm_of(sums[tensors + t])), "the norm of a parameter" + where);
  }
}

/// More arrays than a block has lanes, and more chunks.
void test_folds_of_more_than_the_lanes() {
  for (const uint32_t n : {1u, 2u, 3u, 32u, 33u, 1023u, 1024u, 1025u, 3000u}) {
    std::vector<Squares> sums(n);
    for (auto& sum : sums) {
      const uint32_t scale = below(3) == 0 ? below(kMostScale + 1) : uint32_t(kNoScale);
      sum = {{std::abs(normal()), 1e-9f * normal()}, scale, 0};
    }
    float measured[2] = {};
    const uint64_t skipped = 0;
    uint64_t skipped_out = 0;
    const FinishLaunch finish{sums.data(), &skipped, measured, &skipped_out, n, 0};
    emulation::run_block(0, kFoldLanes, [&] { run<MeasureKnown<0>>(finish); });
    require(
        float_to_bits(measured[0]) == float_to_bits(norm_of(folded_in_order(sums))),
        "a fold of " + std::to_string(n));
  }
}

} // namespace

int main(int, char** arguments) {
  const int rounds = std::atoi(arguments[1]);
  Counted counted;
  for (int round = 0; round < rounds; ++round) {
    test_step(round, counted);
  }
  for (int i = 0; i < kTestedCount; ++i) {
    const bool has_bytes = kTested[i].state == Type::bytes; // of which none is strided
    const bool all = counted.tiled[i] && counted.turned[i] && !counted.strided[i] == has_bytes;
    require(all, "the random tensors miss a kernel of variant " + std::to_string(i));
  }
  require(counted.arenas > 4, "the random launches have few arenas");
  for (int round = 0; round < rounds / 4; ++round) {
    test_measurement(round, counted);
  }
  test_narrowing();
  test_folds_of_more_than_the_lanes();
  test_an_arena_without_tensors_counts_the_step();
  test_a_launch_of<32>();
  test_a_launch_of<64>();
  test_a_launch_of<128>();
  test_a_launch_of<256>();
  std::printf("ok %zu elements\n", counted.elements);
}
