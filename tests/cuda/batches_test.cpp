// csrc/cuda/{,measure_}batches.cpp without a GPU: how many launches, what their tables say,
// and, of random tensors, every launch read back as its kernel reads it. Prints "ok" and the
// number of elements checked, or says what is wrong and fails.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/batches.h"
#include "cuda/measure_batches.h"

using namespace mlx_fused_optim::cuda;

namespace {

void require(bool truth, const std::string& what) {
  if (!truth) {
    std::printf("wrong: %s\n", what.c_str());
    std::exit(1);
  }
}

/// Slots that lie as the parameters do, or of which one does not.
SlotWays slot_ways(bool contiguous = true) {
  SlotWays ways;
  ways.fill(kContiguousWay);
  if (!contiguous) {
    ways[1] = {64, 128, 2};
  }
  return ways;
}

/// With one arena, empty yet.
Batches batches_for(Type type, bool contiguous = true) {
  Batches batches(type, false);
  batches.begin_arena(slot_ways(contiguous));
  return batches;
}

/// An array in memory of float32, whose element at index (row-major) i is unique.
struct TestArray {
  std::vector<float> memory;
  std::vector<int64_t> strides;
  int64_t first = 0;
  bool contiguous = false;

  Source source(Type type) const { return {&memory[first], type, contiguous, strides.data()}; }
};

struct TestTensor {
  std::vector<int32_t> shape;
  uint32_t arena;
  uint64_t offset;
  TestArray parameter, gradient;
};

int64_t element_count(const std::vector<int32_t>& shape) {
  int64_t count = 1;
  for (auto length : shape) {
    count *= length;
  }
  return count;
}

/// Memory offset of row-major element i.
int64_t place(const std::vector<int32_t>& shape, const std::vector<int64_t>& strides, int64_t i) {
  int64_t at = 0;
  for (int d = shape.size() - 1; d >= 0; --d) {
    at += i % shape[d] * strides[d];
    i /= shape[d];
  }
  return at;
}

class Random {
 public:
  int below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(engine_); }

  TestArray array(const std::vector<int32_t>& shape) {
    TestArray a;
    const int n = shape.size();
    a.strides.resize(n);
    const int way = below(4);
    // Axes in some order, each with room behind it, or not; some are broadcast.
    std::vector<int> order(n);
    for (int d = 0; d < n; ++d) {
      order[d] = d;
    }
    if (way >= 2) {
      std::shuffle(order.begin(), order.end(), engine_);
    }
    int64_t stride = 1;
    for (int k = n - 1; k >= 0; --k) {
      const int d = order[k];
      a.strides[d] = way == 3 && below(4) == 0 ? 0 : stride;
      stride *= shape[d] + (way == 3 && below(3) == 0);
    }
    a.first = below(4);
    a.memory.resize(stride + 8);
    for (size_t i = 0; i < a.memory.size(); ++i) {
      a.memory[i] = i;
    }
    int64_t expected = 1;
    a.contiguous = true;
    for (int d = n - 1; d >= 0; --d) {
      a.contiguous &= shape[d] == 1 || a.strides[d] == expected;
      expected *= shape[d];
    }
    return a;
  }

 private:
  std::mt19937 engine_{1};
};

/// Which elements of which tensor have been read, and that each was the right one.
struct Checker {
  const std::vector<TestTensor>& tensors;
  std::vector<std::vector<char>> seen;
  size_t checked = 0;

  explicit Checker(const std::vector<TestTensor>& all) : tensors(all) {
    for (auto& t : all) {
      seen.emplace_back(element_count(t.shape), 0);
    }
  }

  size_t find(const Tensor& tensor) const {
    for (size_t t = 0; t < tensors.size(); ++t) {
      if (tensors[t].arena == tensor.arena &&
          tensors[t].offset == uint64_t(tensor.place) * kPlace && element_count(tensors[t].shape)) {
        return t;
      }
    }
    require(false, "a launch has a tensor that nobody gave");
    return 0;
  }

  void element(const Tensor& tensor, uint64_t i, int64_t parameter_at, int64_t gradient_at) {
    const size_t t = find(tensor);
    auto& want = tensors[t];
    require(i < seen[t].size() && !seen[t][i], "an element outside, or read twice");
    seen[t][i] = 1;
    auto value = [](const void* data, int64_t at) { return static_cast<const float*>(data)[at]; };
    auto expected = [&](const TestArray& a) {
      return a.memory[a.first + place(want.shape, a.strides, i)];
    };
    require(value(tensor.parameter, parameter_at) == expected(want.parameter), "a parameter");
    require(value(tensor.gradient, gradient_at) == expected(want.gradient), "a gradient");
    ++checked;
  }

  void finish() const {
    for (auto& tensor : seen) {
      for (char element : tensor) {
        require(element, "an element that no launch reads");
      }
    }
  }
};

/// Calls visit(tensor, tile) for each block of the launch, found as the kernels do.
template <typename T, typename Visit>
void for_each_block(const Batch<T>& batch, Visit visit) {
  auto& launch = batch.arguments;
  require(launch.common.count <= Launch<T>::kCapacity, "more tensors than fit");
  uint32_t t = 0;
  for (uint32_t block = 0; block < batch.blocks; ++block) {
    while (t + 1 < launch.common.count && launch.tensors[t + 1].first_block <= block) {
      ++t;
    }
    visit(launch.tensors[t], block - launch.tensors[t].first_block);
  }
}

void read_back(const Batches& batches, Checker& checker) {
  for (auto& batch : batches.tiled) {
    for_each_block(*batch, [&](const Tiled& t, uint64_t tile) {
      const uint64_t across = divide_up(t.columns, kTileColumns);
      const uint64_t row = tile / across * tile_rows(false), column = tile % across * kTileColumns;
      for (uint64_t r = row; r < row + tile_rows(false); ++r) {
        for (uint64_t c = column; c < column + kTileColumns && c < t.columns; ++c) {
          const uint64_t i = r * t.columns + c;
          if (i < t.size) {
            checker.element(t, i, i, int64_t(r) * t.row_stride + int64_t(c) * t.column_stride);
          }
        }
      }
      const bool quads = t.columns % kQuad == 0;
      require(!(t.wide & kWideArenas) || quads, "rows of quads");
      require(
          !(t.wide & kWideGradient) || (quads && t.column_stride == 1 && t.row_stride % kQuad == 0),
          "quads of the gradient");
    });
  }
  for (auto& batch : batches.turned) {
    for_each_block(*batch, [&](const Turned& t, uint64_t square) {
      const uint64_t rows = t.size / t.columns, across = divide_up(t.columns, kSquare);
      const uint64_t row = square / across * kSquare, column = square % across * kSquare;
      for (uint64_t r = row; r < row + kSquare && r < rows; ++r) {
        for (uint64_t c = column; c < column + kSquare && c < t.columns; ++c) {
          checker.element(
              t, r * t.columns + c, r * t.columns + c, r + int64_t(c) * t.column_stride);
        }
      }
      require((rows | t.columns | t.column_stride) % kQuad == 0, "quads both ways");
    });
  }
  for (auto& batch : batches.strided) {
    for_each_block(*batch, [&](const Strided& t, uint64_t tile) {
      for (uint64_t i = tile * kTile; i < (tile + 1) * kTile && i < t.size; ++i) {
        int64_t p = 0, g = 0;
        uint64_t rest = i;
        for (int d = t.dimensions - 1; d >= 0; --d) {
          p += int64_t(rest % t.shape[d]) * t.parameter_strides[d];
          g += int64_t(rest % t.shape[d]) * t.gradient_strides[d];
          rest /= t.shape[d];
        }
        checker.element(t, i, p, g);
      }
    });
  }
}

/// The gradient of x @ W.T.
TestArray turned(const std::vector<int32_t>& shape) {
  TestArray a;
  a.strides = {1, shape[0]};
  a.memory.resize(element_count(shape) + 8);
  for (size_t i = 0; i < a.memory.size(); ++i) {
    a.memory[i] = i;
  }
  a.first = reinterpret_cast<uintptr_t>(a.memory.data()) % 16 / 4;
  a.contiguous = shape[0] == 1 || shape[1] == 1;
  return a;
}

void test_random_tensors() {
  Random random;
  size_t checked = 0, turned_launches = 0, strided_launches = 0;
  for (int round = 0; round < 150; ++round) {
    std::vector<TestTensor> tensors;
    std::vector<bool> contiguous{round % 10 != 0}; // by arena
    uint64_t offset = 0;
    for (int t = random.below(12); t >= 0; --t) {
      std::vector<int32_t> shape(random.below(5));
      for (auto& length : shape) {
        const int longest[] = {2, 9, 30};
        length = random.below(longest[random.below(3)]) + (random.below(20) > 0);
      }
      const bool turns = random.below(4) == 0;
      if (turns) {
        shape = {4 * (1 + random.below(40)), 4 * (1 + random.below(40))};
      }
      if (random.below(4) == 0) {
        contiguous.push_back(round % 10 != 0 && random.below(4));
        offset = 0;
      }
      tensors.push_back(
          {shape,
           static_cast<uint32_t>(contiguous.size() - 1),
           offset,
           random.array(shape),
           turns ? turned(shape) : random.array(shape)});
      offset += (element_count(shape) + 63) / 64 * 64;
    }
    const Type type = round % 2 ? Type::float32 : Type::float16;
    Batches batches(type, false);
    uint32_t begun = 0;
    for (auto& t : tensors) {
      for (; begun <= t.arena; ++begun) {
        batches.begin_arena(slot_ways(contiguous[begun]));
      }
      batches.add(
          t.shape.size(),
          t.shape.data(),
          {t.offset, 0, 0, 0},
          t.parameter.source(type),
          t.gradient.source(Type::float32));
    }
    require(
        round % 10 != 0 || (batches.tiled.empty() && batches.turned.empty()),
        "a strided arena needs the strided kernel");
    for (auto& batch : batches.strided) {
      for (uint32_t i = 0; i < batch->arguments.common.count; ++i) {
        auto& tensor = batch->arguments.tensors[i];
        require(tensor.ways[0].columns == 1 && tensor.ways[0].row_stride == 1, "a slot in order");
        require((tensor.ways[1].columns == 1) == contiguous[tensor.arena], "one that is strided");
      }
    }
    Checker checker(tensors);
    read_back(batches, checker);
    checker.finish();
    checked += checker.checked;
    turned_launches += batches.turned.size();
    strided_launches += batches.strided.size();
  }
  require(turned_launches > 20 && strided_launches > 20, "the random tensors miss a kind");
  std::printf("ok %zu elements\n", checked);
}

// ---- Tables ---------------------------------------------------------------------

alignas(16) float memory[1 << 16];

template <typename Call>
void require_refusal(const std::string& words, Call call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    require(std::string(error.what()).find(words) != std::string::npos, error.what());
    return;
  }
  require(false, "must be refused: " + words);
}

Source contiguous(size_t shift = 0, Type type = Type::float32) {
  return {memory + shift, type, true, nullptr};
}

/// Shape, and strides of the gradient.
void add(
    Batches& batches,
    std::vector<int32_t> shape,
    std::vector<int64_t> strides,
    Source parameter = contiguous()) {
  const Source gradient{memory, Type::float32, strides.empty(), strides.data()};
  batches.add(shape.size(), shape.data(), {0, 5, 6, 7}, parameter, gradient);
}

void test_one_launch_of_each_kind_for_all_that_training_has() {
  auto batches = batches_for(Type::float32);
  add(batches, {72, 32}, {});
  add(batches, {72, 32}, {1, 72}); // transposed
  add(batches, {70, 30}, {1, 70}); // likewise, in no quads
  add(batches, {70, 30}, {64, 1}); // rows of a wider one
  add(batches, {70, 30}, {0, 1}); // broadcast
  add(batches, {30}, {-2});
  add(batches, {}, {});
  add(batches, {0, 3}, {});
  require(batches.launches() == 2, "two launches");
  require(batches.tiled.size() == 1 && batches.turned.size() == 1, "one of each kind");
  auto& batch = *batches.tiled[0];
  require(batch.arguments.common.count == 6, "empty tensors are in no launch");
  auto& flat = batch.arguments.tensors[0];
  require(flat.number == 5 && flat.group == 6 && flat.flags == 7, "the member");
  require(flat.columns == kTileColumns && flat.column_stride == 1 && flat.wide == 3, "flat");
  auto& transposed = batch.arguments.tensors[1];
  require(
      transposed.columns == 30 && transposed.row_stride == 1 && transposed.column_stride == 70,
      "transposed");
  require(transposed.first_block == 1 && batch.arguments.tensors[2].first_block == 3, "blocks");
  auto& backwards = batch.arguments.tensors[4];
  require(backwards.columns == kTileColumns && backwards.column_stride == -2, "backwards");
  require(backwards.wide == kWideArenas, "a stride is not read four at a time");
  auto& turned = batches.turned[0]->arguments.tensors[0];
  require(turned.columns == 32 && turned.column_stride == 72, "turned");
  require(batches.turned[0]->blocks == 2, "two squares");
}

void test_what_is_read_four_at_a_time() {
  auto wide = [](std::vector<int32_t> shape, std::vector<int64_t> strides, size_t shift) {
    auto batches = batches_for(Type::float32);
    add(batches, shape, strides, contiguous(shift));
    return batches.tiled[0]->arguments.tensors[0].wide;
  };
  require(wide({100}, {}, 1) == kWideGradient, "an odd parameter");
  require(wide({8, 32}, {1, 9}, 0) == kWideArenas, "a transposed gradient");
  require(wide({8, 30}, {1, 8}, 0) == 0, "rows that begin in the middle of four");
  require(wide({8, 32}, {64, 1}, 0) == (kWideArenas | kWideGradient), "rows");
  require(wide({8, 32}, {63, 1}, 0) == kWideArenas, "rows at odd addresses");
  const int32_t shape[] = {100};
  for (size_t shift = 0; shift < 4; ++shift) {
    auto batches = batches_for(Type::float16);
    batches.add(1, shape, {}, contiguous(0, Type::float16), contiguous(shift));
    const bool aligned = batches.tiled[0]->arguments.tensors[0].wide & kWideGradient;
    require(aligned == (shift == 0), "a gradient at a multiple of 4 bytes");
  }
}

void test_what_is_turned() {
  auto turns = [](std::vector<int32_t> shape, std::vector<int64_t> strides, size_t shift = 0) {
    auto batches = batches_for(Type::bfloat16);
    add(batches, shape, strides, contiguous(shift, Type::bfloat16));
    return batches.turned.size() == 1;
  };
  require(turns({8, 32}, {1, 8}) && turns({8, 32}, {1, 12}), "of x @ W.T");
  require(!turns({7, 32}, {1, 8}), "rows that do not end with a quad");
  require(!turns({8, 30}, {1, 8}), "columns");
  require(!turns({8, 32}, {1, 9}), "columns at odd addresses");
  require(!turns({8, 32}, {2, 16}), "rows with gaps");
  require(!turns({8, 32}, {1, 8}, 1), "an odd parameter");
  require(!turns({8, 32}, {32, 1}), "as it lies");
}

void test_what_needs_the_strided_kernel() {
  auto batches = batches_for(Type::float32);
  add(batches, {2, 3, 4}, {1, 2, 6});
  const int64_t strides[] = {1, 70};
  add(batches, {70, 30}, {}, {memory, Type::float32, false, strides});
  add(batches, {2, 4}, {int64_t(1) << 33, 1}); // beyond the 32 bits of the others
  require(batches.launches() == 1 && batches.strided.size() == 1, "strided");
  require(batches.strided[0]->arguments.tensors[0].dimensions == 3, "dimensions");

  auto with_a_strided_arena = batches_for(Type::float32, false);
  add(with_a_strided_arena, {70, 30}, {});
  add(with_a_strided_arena, {72, 32}, {1, 72});
  require(
      with_a_strided_arena.tiled.empty() && with_a_strided_arena.turned.empty(), "a strided arena");
  auto& tensor = with_a_strided_arena.strided[0]->arguments.tensors[0];
  require(tensor.dimensions == 1 && tensor.shape[0] == 2100, "which is flat");
}

void test_an_arena_without_tensors() {
  auto batches = batches_for(Type::float16);
  batches.add_nothing();
  require(batches.launches() == 1 && batches.tiled[0]->blocks == 1, "a block counts the step");
  require(batches.tiled[0]->arguments.tensors[0].size == 0, "and does nothing else");
}

void test_gradients_of_several_types() {
  const int32_t shape[] = {5};
  auto batches = batches_for(Type::float32);
  batches.add(1, shape, {}, contiguous(), contiguous(0, Type::bfloat16));
  require(batches.gradients == bit_of(Type::bfloat16), "one type");
  batches.add(1, shape, {}, contiguous(), contiguous());
  require(batches.gradients == (bit_of(Type::bfloat16) | bit_of(Type::float32)), "two");
}

template <typename T>
size_t tensors_begin() {
  const auto launch = std::make_unique<T>();
  return reinterpret_cast<const char*>(launch->tensors) -
      reinterpret_cast<const char*>(launch.get());
}

/// A kernel declares how a launch begins: what it has, and seldom twice that.
void test_capacity_for() {
  require(tensors_begin<Launch<Tiled, 32>>() == tensors_begin<Launch<Tiled>>(), "tiles");
  require(tensors_begin<Launch<Turned, 64>>() == tensors_begin<Launch<Turned>>(), "squares");
  require(tensors_begin<Launch<Strided, 32>>() == tensors_begin<Launch<Strided>>(), "strided");
  require(tensors_begin<Launch<Dense, 128>>() == tensors_begin<Launch<Dense>>(), "dense");
  require(tensors_begin<Launch<Sparse, 64>>() == tensors_begin<Launch<Sparse>>(), "sparse");
  for (uint32_t count = 0; count <= kMost<Tiled>; ++count) {
    const uint32_t capacity = capacity_for<Tiled>(count);
    require(capacity == 0 ? count > 256 : count <= capacity, "too few");
    require(count <= 32 ? capacity == 32 : capacity < 2 * count, "too many");
  }
  require(kMost<Strided> < 128 && capacity_for<Strided>(65) == 0, "more than fit");
  require(capacity_for<Strided>(33) == 64, "fewer than fit");
}

void test_capacity() {
  auto batches = batches_for(Type::bfloat16);
  const uint32_t capacity = Launch<Tiled>::kCapacity;
  for (uint32_t t = 0; t < capacity + 1; ++t) {
    add(batches, {5}, {});
  }
  require(batches.launches() == 2, "two launches");
  require(batches.tiled[0]->arguments.common.count == capacity, "the first is full");
  require(batches.tiled[1]->arguments.tensors[0].first_block == 0, "blocks begin anew");

  MeasureBatches arrays;
  const int32_t shape[] = {5000};
  const uint32_t most = Launch<Dense>::kCapacity;
  for (uint32_t t = 0; t < most + 1; ++t) {
    arrays.add(1, shape, contiguous(), true, true);
  }
  require(arrays.dense.size() == 2 && arrays.sparse.empty(), "two launches of arrays");
  require(arrays.chunks() == 3 * (most + 1), "chunks");
  auto& last = arrays.dense[1]->arguments.tensors[0];
  require(last.first_block == 0 && last.first_chunk == 3 * most, "chunks do not begin anew");
}

void test_arrays_to_measure() {
  MeasureBatches arrays;
  const int32_t empty[] = {0}, square[] = {64, 33};
  const int64_t turned[] = {1, 64}, any[] = {2, 128};
  arrays.add(1, empty, contiguous(), true, true);
  arrays.add(2, square, {memory + 1, Type::float32, false, turned}, true, true);
  arrays.add(2, square, {memory, Type::float16, false, any}, false, false);
  require(arrays.arrays() == 3, "an empty array has a sum, too");
  require(arrays.first_chunk == std::vector<uint32_t>({0, 0, 2, 4}), "chunks of each");
  auto& dense = arrays.dense[0]->arguments.tensors[0];
  require(dense.size == 64 * 33 && !dense.aligned && dense.is_gradient, "dense");
  auto& sparse = arrays.sparse[0]->arguments.tensors[0];
  require(sparse.dimensions == 2 && sparse.strides[0] == 2 && !sparse.is_gradient, "sparse");
}

void test_refusals() {
  std::vector<int32_t> shape(12, 2);
  std::vector<int64_t> strides(12);
  for (int d = 0; d < 12; ++d) {
    strides[d] = int64_t(3) << (2 * d);
  }
  auto batches = batches_for(Type::float32);
  MeasureBatches arrays;
  const Source strided{memory, Type::float32, false, strides.data()};
  require_refusal("too many dimensions: got more than 10", [&] { add(batches, shape, strides); });
  require_refusal("too many dimensions: got more than 10", [&] {
    arrays.add(12, shape.data(), strided, true, false);
  });
  const std::vector<int32_t> large = {2147483647, 2147483647, 4};
  require_refusal("a tensor is too large for CUDA", [&] { add(batches, large, {}); });
  require_refusal("a tensor is too large for CUDA", [&] {
    arrays.add(3, large.data(), contiguous(), true, true);
  });
  require(batches.launches() == 0 && arrays.launches() == 0, "what was refused is nowhere");
}

} // namespace

int main() {
  test_one_launch_of_each_kind_for_all_that_training_has();
  test_what_is_read_four_at_a_time();
  test_what_is_turned();
  test_what_needs_the_strided_kernel();
  test_an_arena_without_tensors();
  test_gradients_of_several_types();
  test_capacity_for();
  test_capacity();
  test_arrays_to_measure();
  test_refusals();
  test_random_tensors();
}
