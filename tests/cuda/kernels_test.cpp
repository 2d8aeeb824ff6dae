// The kernels of the full step and of the measurement without a GPU: random tensors are
// packed as the host packs them, the kernels are run by emulation.h, and every bit is
// compared with csrc/math taken one element after another. Prints "ok" and the numbers
// of elements, or says what is wrong and fails.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "emulation.h"

#include "../../cuda/full.cu"
#include "../../cuda/measure.cu"
#include "cuda/full_batches.h"
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
        : type == Type::float16  ? __half2float({static_cast<uint16_t>(bits(at))})
                                 : bits_to_float(bits(at) << 16);
  }
  void set(size_t at, float x) {
    set_bits(
        at,
        type == Type::float32       ? float_to_bits(x)
            : type == Type::float16 ? __float2half_rn(x).bits
                                    : float_to_bits(nearest_bfloat16(x)) >> 16);
  }
  void fill(bool any_bits = false) {
    for (size_t i = 0; i < (words.size() * 16 - shift * size_of(type)) / size_of(type); ++i) {
      any_bits ? set_bits(i, engine()) : set(i, normal());
    }
  }
};

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

Type random_type() { return static_cast<Type>(below(3)); }

template <typename T>
void run(BatchList<T>& batches, const typename T::Shared& common, void (*kernel)(Launch<T>)) {
  for (auto& batch : batches) {
    const uint32_t count = batch->arguments.common.count;
    batch->arguments.common = common;
    batch->arguments.common.count = count;
    for (uint32_t block = 0; block < batch->blocks; ++block) {
      emulation::run_block(block, kThreads, [&] { kernel(batch->arguments); });
    }
  }
}

// ---- The step -------------------------------------------------------------------

using TiledKernel = void (*)(Launch<Tiled>);
using StridedKernel = void (*)(Launch<FullStrided>);
#define VARIANT(parameter, velocity, name, flags) sgd_full_tiled_##parameter##_##velocity##_##name,
constexpr TiledKernel kVariants[] = {MLX_FUSED_OPTIM_FULL_VARIANTS(VARIANT)};
#undef VARIANT
constexpr TiledKernel kGeneric[] = {
    sgd_full_tiled_float32,
    sgd_full_tiled_float16,
    sgd_full_tiled_bfloat16};
constexpr StridedKernel kStrided[] = {
    sgd_full_strided_float32,
    sgd_full_strided_float16,
    sgd_full_strided_bfloat16};

/// All that a step may consist of, with every variant and with the generic kernels in turn.
struct Options {
  Type type, velocity;
  uint32_t flags;

  int variant() const { return full_variant(type, velocity, flags); }
};

Options random_options(int round) {
  const int turn = round % (kFullVariantCount + 3);
  uint32_t flags = engine() & 0x7fff;
  if (turn < kFullVariantCount) {
    auto& variant = kFullVariants[turn];
    flags = (flags & ~kCompiledFlags) | variant.flags;
    flags |= variant.velocity != variant.parameter ? kMomentum : 0;
    const Options options{variant.parameter, variant.velocity, flags};
    require(options.variant() == turn, variant.kernel);
    return options;
  }
  Options options{static_cast<Type>(turn - kFullVariantCount), random_type(), flags};
  options.flags &= options.type == Type::float32 ? ~(kMaster | kCompensated)
      : flags & kMaster                          ? ~kCompensated
                                                 : ~0u;
  return options.variant() < 0 ? options : random_options(round);
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
  uint32_t flags;
  Array parameter, gradient;
};

/// An arena before and after, which may be the same; `stride` is between elements.
struct TestArena {
  std::shared_ptr<Memory> before, after;
  int64_t stride = 1;
};

struct Counted {
  size_t tiled[kFullVariantCount + 3] = {}, strided = 0, elements = 0;
};

void test_step(int round, Counted& counted) {
  const Options options = random_options(round);
  const auto [type, velocity, flags] = options;
  const bool skips = round % 7 == 0, in_place = below(2), special = round % 3 == 1;
  const uint32_t slot_flags[kSlots] = {kMomentum, kMaster, kCompensated, kAverage};

  FullCommon common{};
  common.control.flags = skips ? flags | kSkipNonfinite : flags;
  common.control.given = 0xf;
  common.control.seed = engine();
  common.control.place = engine();
  common.control.gradient_weight = 0.75f;
  common.control.clip_value = 0.5f;
  common.control.clip_norm = 3.0f;
  common.control.trust_coefficient = 0.01f;
  common.control.average_weight = 0.125f;
  common.control.parameter_format = static_cast<uint32_t>(type);
  common.control.velocity_format = static_cast<uint32_t>(velocity);
  const uint64_t step = 41;
  const float given[] = {0.1f, 0.9f, 0.01f, 4.0f};
  std::vector<float> measured = {5.0f, skips ? 0.0f : 1.0f}, groups;
  const bool counts = skips || (flags & kStochastic) || below(2); // else it needs no step
  common.step = counts ? &step : nullptr;
  common.given = given;

  const int tensors = 1 + below(8);
  std::vector<TestTensor> all(tensors);
  uint64_t arena_size = 0;
  const uint64_t granule = kGranule / size_of(type);
  for (auto& t : all) {
    t.shape = random_shape();
    t.size = element_count(t.shape.size(), t.shape.data());
    t.offset = arena_size;
    t.flags = common.control.flags & (engine() | ~kTensorFlags);
    arena_size += divide_up(t.size, granule) * granule;
    measured.insert(measured.end(), {std::abs(normal()), std::abs(normal())});
    for (uint32_t i = 0; i < kGroupNumbers; ++i) {
      groups.push_back(normal());
    }
  }
  common.measured = measured.data();
  common.groups = groups.data();

  // Arenas, some of them at odd addresses.
  const size_t shift = below(4) == 0;
  auto parameters = std::make_shared<Memory>(type, arena_size, shift);
  auto fill = [&](Memory& memory) {
    memory.fill(skips);
    if (special && !skips) {
      add_special(memory);
    }
  };
  fill(*parameters);
  TestArena slots[kSlots];
  bool contiguous = true;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (!(flags & slot_flags[slot])) {
      continue;
    }
    auto& s = slots[slot];
    const Type slot_type = slot == kVelocity ? static_cast<Type>(common.control.velocity_format)
        : slot == kCompensation              ? type
                                             : Type::float32;
    s.stride = !in_place && below(6) == 0 ? 2 : 1;
    contiguous &= s.stride == 1;
    s.before = std::make_shared<Memory>(slot_type, s.stride * arena_size, shift);
    fill(*s.before);
    s.after = in_place ? s.before : std::make_shared<Memory>(slot_type, arena_size);
    if (!in_place) {
      s.after->fill();
    }
  }

  FullBatches batches(type, contiguous);
  for (int i = 0; i < tensors; ++i) {
    auto& t = all[i];
    const auto gradient_type = below(2) ? type : random_type();
    t.gradient = random_array(t.shape, gradient_type, static_cast<Lying>(below(3)));
    t.gradient.memory->fill();
    if (special) {
      add_special(*t.gradient.memory);
    }
    if (in_place) {
      t.parameter = random_array(t.shape, type, Lying::contiguous);
      t.parameter.memory = parameters;
      t.parameter.first = t.offset;
    } else {
      t.parameter =
          random_array(t.shape, type, below(4) ? Lying::contiguous : static_cast<Lying>(below(3)));
      fill(*t.parameter.memory);
    }
    const auto number = static_cast<uint32_t>(i);
    batches.add(
        t.shape.size(),
        t.shape.data(),
        {t.offset, number, number, t.flags},
        t.parameter.source(),
        t.gradient.source());
  }

  // What is expected, from the formulas alone.
  Memory expected(type, arena_size);
  std::vector<Memory> expected_slots;
  for (auto& s : slots) {
    expected_slots.emplace_back(s.before ? s.before->type : type, arena_size);
  }
  const auto hyper = sgd_full_hyper(common.control, step, common.given, common.measured);
  for (int i = 0; i < tensors; ++i) {
    auto& t = all[i];
    const auto own = sgd_tensor_hyper(
        hyper,
        common.control.trust_coefficient,
        t.flags,
        groups.data() + i * kGroupNumbers,
        measured.data() + kMeasuredTensors + 2 * i);
    for (uint64_t e = 0; e < t.size; ++e) {
      const uint64_t at = t.offset + e;
      const int64_t from = t.parameter.first + place(t.shape, t.parameter.strides, e);
      const int64_t g = t.gradient.first + place(t.shape, t.gradient.strides, e);
      float values[kSlots] = {};
      for (int slot = 0; slot < kSlots; ++slot) {
        if (slots[slot].before) {
          values[slot] = slots[slot].before->get(at * slots[slot].stride);
          expected_slots[slot].set_bits(at, slots[slot].before->bits(at * slots[slot].stride));
        }
      }
      expected.set_bits(at, t.parameter.memory->bits(from));
      if (skips) {
        continue;
      }
      const SgdFullElement result = sgd_full_element<float>(
          {t.parameter.memory->get(from), values[0], values[1], values[2], values[3]},
          t.gradient.memory->get(g),
          static_cast<uint32_t>(at),
          own,
          t.flags,
          common.control.parameter_format,
          common.control.velocity_format);
      expected.set(at, result.parameter);
      const float after[] = {result.velocity, result.master, result.compensation, result.average};
      for (int slot = 0; slot < kSlots; ++slot) {
        if (slots[slot].before) {
          expected_slots[slot].set(at, after[slot]);
        }
      }
    }
    counted.elements += t.size;
  }

  common.aligned = is_aligned(parameters->data(), 16);
  common.parameters_out = parameters->data();
  for (int slot = 0; slot < kSlots; ++slot) {
    auto& s = slots[slot];
    if (s.before) {
      const auto rows = arena_size / granule; // as a matrix
      common.slots[slot] = {
          s.before->data(),
          s.after->data(),
          rows > 1 ? granule : arena_size,
          static_cast<int64_t>(granule) * s.stride,
          s.stride};
      common.aligned &= is_aligned(s.before->data(), 16) && is_aligned(s.after->data(), 16);
    }
  }
  uint64_t next = 0;
  float used[kScalars] = {};
  common.step_out = counts ? &next : nullptr;
  common.used_out = used;
  const int variant = options.variant(), type_number = static_cast<int>(type);
  counted.tiled[variant < 0 ? kFullVariantCount + type_number : variant] += batches.tiled.size();
  counted.strided += batches.strided.size();
  run(batches.tiled, common, variant < 0 ? kGeneric[type_number] : kVariants[variant]);
  run(batches.strided, common, kStrided[type_number]);

  require(next == (!counts ? 0 : skips ? step : step + 1), "the step counter");
  require(
      !counts ||
          (std::equal(used, used + 3, given) && used[3] == (flags & kGradScale ? given[3] : 1.0f)),
      "the numbers used");
  for (uint64_t e = 0; e < arena_size; ++e) {
    const auto where = " of element " + std::to_string(e) + ", round " + std::to_string(round);
    require(is_same(*parameters, expected, e), "the parameter" + where);
    for (int slot = 0; slot < kSlots; ++slot) {
      require(
          !slots[slot].after || is_same(*slots[slot].after, expected_slots[slot], e),
          "slot " + std::to_string(slot) + where);
    }
  }
}

void test_an_arena_without_tensors_counts_the_step() {
  FullBatches batches(Type::float32, true);
  batches.add_nothing();
  FullCommon common{};
  common.control.given = 0xf;
  const uint64_t step = 41;
  const float given[] = {0.1f, 0.9f, 0.01f, 4.0f};
  uint64_t next = 0;
  float used[kScalars] = {};
  common.step = &step;
  common.given = given;
  common.step_out = &next;
  common.used_out = used;
  run(batches.tiled, common, sgd_full_tiled_float32);
  require(next == 42 && used[0] == 0.1f && used[3] == 1.0f, "a step of nothing");
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
          (float16.words[k / 2] >> half & 0xffff) ==
              __half_as_ushort(__float2half_rn(nearest_float16(values[k]))),
          "float16");
      require(float32.words[k] == float_to_bits(values[k]), "float32");
    }
  }
}

/// The host's choice: of every combination, a kernel that sees just its flags, and the
/// momentum's dtype; the generic one where the list has none.
void test_the_choice_of_a_variant() {
#define VARIANT(parameter, velocity, name, flags) \
  {Variant<parameter, velocity, flags>::kHas, Variant<parameter, velocity, flags>::kMay},
  constexpr uint32_t known[][2] = {MLX_FUSED_OPTIM_FULL_VARIANTS(VARIANT)};
#undef VARIANT
  size_t generic = 0;
  for (uint32_t flags = 0; flags < 2 * kMeasureNorm; ++flags) {
    for (const Type type : {Type::float32, Type::float16, Type::bfloat16}) {
      for (const Type velocity : {Type::float32, Type::float16, Type::bfloat16}) {
        const int chosen = full_variant(type, velocity, flags);
        const bool has_momentum = flags & kMomentum;
        bool listed = false;
        for (auto& variant : kFullVariants) {
          listed |= variant.parameter == type && (!has_momentum || variant.velocity == velocity) &&
              variant.flags == (flags & kCompiledFlags);
        }
        require((chosen >= 0) == listed, "a variant that is listed is taken");
        if (chosen < 0) {
          ++generic;
          continue;
        }
        auto& variant = kFullVariants[chosen];
        require(variant.parameter == type, "the dtype");
        require(!has_momentum || variant.velocity == velocity, "the momentum's dtype");
        // A tensor may be without some of kTensorFlags, which no kernel adds.
        for (const uint32_t own : {flags, flags & ~kTensorFlags}) {
          require(((own & known[chosen][1]) | known[chosen][0]) == own, "the flags seen");
        }
      }
    }
  }
  require(generic > 0, "some are generic");
  const auto common = [](Type type, Type velocity, uint32_t flags) {
    return full_variant(type, velocity, flags | kMomentum | kClipNorm | kGroups) >= 0;
  };
  for (const Type half : {Type::float16, Type::bfloat16}) {
    for (const uint32_t kept : {uint32_t(0), uint32_t(kMaster)}) {
      require(common(half, half, kept) && common(half, Type::float32, kept), "a common step");
    }
    require(common(half, half, kCompensated) && common(half, half, kStochastic), "a common step");
    require(!common(half, half, kCompensated | kStochastic), "a rare one");
    require(!common(half, half, kMaster | kAverage), "a rare one");
  }
  require(common(Type::float32, Type::float32, 0), "a common step");
  require(!common(Type::float32, Type::float16, 0), "a rare one");
}

// ---- The measurement -------------------------------------------------------------

/// The fold of csrc/math/norm.h, lane by lane.
Real folded_in_order(const std::vector<Real>& values) {
  std::vector<Real> lanes(kFoldLanes, Real{0, 0});
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

Real sum_in_order(const std::vector<float>& values) {
  std::vector<Real> chunks;
  for (size_t begin = 0; begin < values.size(); begin += kChunk) {
    float lanes[kLanes] = {};
    for (size_t i = begin; i < values.size() && i < begin + kChunk; ++i) {
      lanes[i % kLanes] = lanes[i % kLanes] + values[i] * values[i];
    }
    for (uint32_t half = kLanes / 2; half > 0; half /= 2) {
      for (uint32_t lane = 0; lane < half; ++lane) {
        lanes[lane] = lanes[lane] + lanes[lane + half];
      }
    }
    chunks.push_back({lanes[0], 0});
  }
  return folded_in_order(chunks);
}

void test_measurement(int round, Counted& counted) {
  MeasureCommon common{};
  common.control.flags = engine() & 0x7fff;
  common.control.given = 1 << kGradScaleFactor;
  common.control.clip_value = 0.5f;
  const uint64_t step = 0;
  // Of a scale of zero, what is behind the end of an array must not become NaN.
  const float given[] = {0, 0, 0, round % 5 == 0 ? 0.0f : 0.3f};
  common.step = &step;
  common.given = given;
  const auto hyper = sgd_gradient_hyper(common.control, step, common.given);

  const uint32_t tensors = 1 + below(3);
  std::vector<Array> arrays;
  std::vector<Real> sums;
  uint32_t peak = 0;
  MeasureBatches batches;
  for (uint32_t i = 0; i < 2 * tensors; ++i) {
    auto shape = random_shape();
    if (below(4) == 0) {
      shape = {below(2) * 3, static_cast<int>(kChunk * kChunksPerBlock / 3) + below(3)}; // or empty
    }
    const auto way = static_cast<Lying>(below(3));
    auto& a = arrays.emplace_back(random_array(shape, random_type(), way));
    a.memory->fill();
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
      peak = is_gradient ? peak_of(peak, x) : peak;
      values.push_back(is_gradient ? sgd_gradient(x, hyper, common.control.flags) : x);
    }
    sums.push_back(sum_in_order(values));
    counted.elements += size;
  }

  std::vector<ChunkSum> chunks(batches.chunks());
  std::vector<ArraySum> array_sums(batches.arrays());
  std::vector<float> measured(2 + 2 * tensors, -1.0f);
  common.chunks = chunks.data();
  run(batches.dense, common, measure_dense);
  run(batches.sparse, common, measure_sparse);
  auto folds = std::make_unique<FoldLaunch>();
  folds->chunks = chunks.data();
  folds->sums = array_sums.data();
  folds->norms = measured.data() + kMeasuredTensors;
  folds->gradient_count = tensors;
  folds->first_array = 0;
  std::copy(batches.first_chunk.begin(), batches.first_chunk.end(), folds->first_chunk);
  for (uint32_t a = 0; a < batches.arrays(); ++a) {
    emulation::run_block(a, kFoldLanes, [&] { measure_fold(*folds); });
  }
  const uint64_t skipped = 7;
  uint64_t skipped_out = 0;
  const FinishLaunch finish{
      array_sums.data(), &skipped, measured.data(), &skipped_out, tensors, common.control.flags};
  emulation::run_block(0, kFoldLanes, [&] { measure_finish(finish); });

  auto same = [](float a, float b) {
    return float_to_bits(a) == float_to_bits(b) || (a != a && b != b);
  };
  const auto where = ", round " + std::to_string(round);
  const float norm = sgd_norm(folded_in_order({sums.begin(), sums.begin() + tensors}));
  const bool applies = sgd_applies(common.control.flags, peak, norm);
  require(same(measured[kMeasuredNorm], norm), "the global norm" + where);
  require(measured[kMeasuredApply] == (applies ? 1.0f : 0.0f), "whether it applies" + where);
  require(skipped_out == skipped + !applies, "the steps skipped" + where);
  for (uint32_t t = 0; t < tensors; ++t) {
    const float* norms = &measured[kMeasuredTensors + 2 * t];
    require(same(norms[0], sgd_norm(sums[t])), "the norm of a gradient" + where);
    require(same(norms[1], sgd_norm(sums[tensors + t])), "the norm of a parameter" + where);
  }
}

/// More arrays than a block has lanes, and more chunks.
void test_folds_of_more_than_the_lanes() {
  for (const uint32_t n : {1u, 2u, 3u, 32u, 33u, 1023u, 1024u, 1025u, 3000u}) {
    std::vector<ArraySum> sums(n);
    std::vector<Real> values;
    for (auto& sum : sums) {
      sum = {{std::abs(normal()), 1e-9f * normal()}, 0};
      values.push_back(sum.sum);
    }
    float measured[2] = {};
    const uint64_t skipped = 0;
    uint64_t skipped_out = 0;
    const FinishLaunch finish{sums.data(), &skipped, measured, &skipped_out, n, 0};
    emulation::run_block(0, kFoldLanes, [&] { measure_finish(finish); });
    require(
        float_to_bits(measured[0]) == float_to_bits(sgd_norm(folded_in_order(values))),
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
  const size_t some = rounds / 6;
  require(counted.strided > some, "the random tensors miss a kind");
  for (auto tiled : counted.tiled) {
    require(tiled > 0, "the random tensors miss a variant");
  }
  for (int round = 0; round < rounds / 4; ++round) {
    test_measurement(round, counted);
  }
  test_narrowing();
  test_the_choice_of_a_variant();
  test_folds_of_more_than_the_lanes();
  test_an_arena_without_tensors_counts_the_step();
  std::printf("ok %zu elements\n", counted.elements);
}
