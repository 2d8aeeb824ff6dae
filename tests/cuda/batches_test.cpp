// csrc/cuda/batches.cpp without a GPU: random tensors are sorted into launches, and
// every launch is then read back as its kernel reads it. Prints "ok" and the number
// of elements checked, or says what is wrong and fails.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/batches.h"

using namespace mlx_fused_optim::cuda;

namespace {

void require(bool truth, const std::string& what) {
  if (!truth) {
    std::printf("wrong: %s\n", what.c_str());
    std::exit(1);
  }
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
      if (tensors[t].offset == tensor.offset && element_count(tensors[t].shape)) {
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

void read_back(const Batches& batches, Type type, Checker& checker) {
  const uint64_t tile_size = tile_elements(size_of(type));
  for (auto& batch : batches.flat) {
    for_each_block(*batch, [&](const Flat& t, uint64_t tile) {
      for (uint64_t i = tile * tile_size; i < (tile + 1) * tile_size && i < t.size; ++i) {
        checker.element(t, i, i, i);
      }
    });
  }
  for (auto& batch : batches.transposed) {
    for_each_block(*batch, [&](const Transposed& t, uint64_t tile) {
      const uint64_t across = (t.columns + kSquare - 1) / kSquare;
      for (uint64_t r = tile / across * kSquare, n = 0; n < kSquare && r < t.rows; ++n, ++r) {
        for (uint64_t c = tile % across * kSquare, m = 0; m < kSquare && c < t.columns; ++m, ++c) {
          checker.element(t, r * t.columns + c, r * t.columns + c, r + int64_t(c) * t.stride);
        }
      }
      require(!t.aligned || (t.rows | t.columns | t.stride) % kSquareVector == 0, "alignment");
    });
  }
  for (auto& batch : batches.strided) {
    for_each_block(*batch, [&](const Strided& t, uint64_t tile) {
      for (uint64_t i = tile * tile_size; i < (tile + 1) * tile_size && i < t.size; ++i) {
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

void test_random_tensors() {
  Random random;
  size_t checked = 0, transposed = 0, strided = 0;
  for (int round = 0; round < 150; ++round) {
    std::vector<TestTensor> tensors;
    uint64_t offset = 0;
    for (int t = random.below(12); t >= 0; --t) {
      std::vector<int32_t> shape(random.below(5));
      for (auto& length : shape) {
        const int longest[] = {2, 9, 70};
        length = random.below(longest[random.below(3)]) + (random.below(20) > 0);
      }
      tensors.push_back({shape, offset, random.array(shape), random.array(shape)});
      offset += (element_count(shape) + 63) / 64 * 64;
    }
    const Type type = round % 2 ? Type::float32 : Type::float16;
    Batches batches(type, round % 10 != 0);
    for (auto& t : tensors) {
      batches.add(
          t.shape.size(),
          t.shape.data(),
          t.offset,
          t.parameter.source(type),
          t.gradient.source(Type::float32));
    }
    require(round % 10 != 0 || batches.flat.empty(), "a strided momentum needs the strided kernel");
    Checker checker(tensors);
    read_back(batches, type, checker);
    checker.finish();
    checked += checker.checked;
    transposed += batches.transposed.size();
    strided += batches.strided.size();
  }
  require(transposed > 20 && strided > 20, "the random tensors miss a kind");
  std::printf("ok %zu elements\n", checked);
}

void test_as_few_launches_as_hold_the_tensors() {
  const int32_t shape[] = {5};
  const int64_t strides[] = {1};
  alignas(16) static float memory[8];
  const uint32_t capacity = Launch<Flat>::kCapacity;
  Batches batches(Type::float32, true);
  for (uint32_t t = 0; t < 2 * capacity + 1; ++t) {
    const Source array{memory, Type::float32, true, strides};
    batches.add(1, shape, 64 * t, array, array);
  }
  require(batches.launches() == 3, "three launches");
  require(batches.flat[0]->arguments.common.count == capacity, "the first launch is full");
  require(batches.flat[2]->arguments.common.count == 1, "one tensor is left");
  require(batches.flat[2]->arguments.tensors[0].first_block == 0, "blocks begin anew");
}

void test_alignment() {
  const int32_t shape[] = {100};
  const int64_t strides[] = {1};
  alignas(16) static float memory[128];
  for (int shift = 0; shift < 4; ++shift) {
    Batches batches(Type::float16, true);
    const Source parameter{memory, Type::float16, true, strides};
    const Source gradient{memory + shift, Type::float32, true, strides};
    batches.add(1, shape, 0, parameter, gradient);
    auto& tensor = batches.flat[0]->arguments.tensors[0];
    require(tensor.parameter_aligned == 1, "an aligned parameter");
    require(tensor.gradient_aligned == (shift == 0), "a gradient at a multiple of 4 bytes");
  }
}

void test_refusals() {
  std::vector<int32_t> shape(12, 2);
  std::vector<int64_t> strides(12);
  for (int d = 0; d < 12; ++d) {
    strides[d] = int64_t(3) << (2 * d);
  }
  static float memory[1];
  Batches batches(Type::float32, true);
  const Source strided{memory, Type::float32, false, strides.data()};
  try {
    batches.add(12, shape.data(), 0, strided, strided);
    require(false, "twelve dimensions must be refused");
  } catch (const std::invalid_argument& error) {
    require(
        std::string(error.what()).find("too many dimensions: got more than 10") !=
            std::string::npos,
        error.what());
  }
  const int32_t large[] = {2147483647, 2147483647, 4};
  const Source contiguous{memory, Type::float32, true, strides.data()};
  try {
    batches.add(3, large, 0, contiguous, contiguous);
    require(false, "more tiles than a grid has must be refused");
  } catch (const std::invalid_argument& error) {
    require(
        std::string(error.what()).find("a tensor is too large for CUDA") != std::string::npos,
        error.what());
  }
  require(batches.launches() == 0, "what was refused is in no launch");
}

} // namespace

int main() {
  test_as_few_launches_as_hold_the_tensors();
  test_alignment();
  test_refusals();
  test_random_tensors();
}
