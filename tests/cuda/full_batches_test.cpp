// csrc/cuda/{full,measure}_batches.cpp: how many launches, and what their tables say.
// That every element is read is kernels_test.cpp's.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/full_batches.h"
#include "cuda/measure_batches.h"

using namespace mlx_fused_optim::cuda;

namespace {

alignas(16) float memory[1 << 16];

void require(bool truth, const std::string& what) {
  if (!truth) {
    std::printf("wrong: %s\n", what.c_str());
    std::exit(1);
  }
}

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
    FullBatches& batches,
    std::vector<int32_t> shape,
    std::vector<int64_t> strides,
    Source parameter = contiguous()) {
  const Source gradient{memory, Type::float32, strides.empty(), strides.data()};
  batches.add(shape.size(), shape.data(), {0, 5, 6, 7}, parameter, gradient);
}

void test_one_launch_for_all_that_training_has() {
  FullBatches batches(Type::float32, true);
  add(batches, {70, 30}, {});
  add(batches, {70, 30}, {1, 70}); // transposed
  add(batches, {70, 30}, {64, 1}); // rows of a wider one
  add(batches, {70, 30}, {0, 1}); // broadcast
  add(batches, {30}, {-2});
  add(batches, {}, {});
  add(batches, {0, 3}, {});
  require(batches.launches() == 1 && batches.tiled.size() == 1, "one launch");
  auto& batch = *batches.tiled[0];
  require(batch.arguments.common.count == 6, "empty tensors are in no launch");
  auto& flat = batch.arguments.tensors[0];
  require(flat.number == 5 && flat.group == 6 && flat.flags == 7, "the member");
  require(flat.columns == kTileColumns && flat.column_stride == 1 && flat.wide == 3, "flat");
  auto& turned = batch.arguments.tensors[1];
  require(turned.columns == 30 && turned.row_stride == 1 && turned.column_stride == 70, "turned");
  require(turned.first_block == 1 && batch.arguments.tensors[2].first_block == 3, "blocks");
  auto& backwards = batch.arguments.tensors[4];
  require(backwards.columns == kTileColumns && backwards.column_stride == -2, "backwards");
  require(backwards.wide == kWideArenas, "a stride is not read four at a time");
}

void test_what_is_read_four_at_a_time() {
  auto wide = [](std::vector<int32_t> shape, std::vector<int64_t> strides, size_t shift) {
    FullBatches batches(Type::float32, true);
    add(batches, shape, strides, contiguous(shift));
    return batches.tiled[0]->arguments.tensors[0].wide;
  };
  require(wide({100}, {}, 1) == kWideGradient, "an odd parameter");
  require(wide({8, 32}, {1, 8}, 0) == kWideArenas, "a transposed gradient");
  require(wide({8, 30}, {1, 8}, 0) == 0, "rows that begin in the middle of four");
  require(wide({8, 32}, {64, 1}, 0) == (kWideArenas | kWideGradient), "rows");
  require(wide({8, 32}, {63, 1}, 0) == kWideArenas, "rows at odd addresses");
}

void test_what_needs_a_launch_of_its_own() {
  FullBatches batches(Type::float32, true);
  add(batches, {2, 3, 4}, {1, 2, 6});
  const int64_t strides[] = {1, 70};
  add(batches, {70, 30}, {}, {memory, Type::float32, false, strides});
  require(batches.tiled.empty() && batches.strided.size() == 1, "strided");
  require(batches.strided[0]->arguments.tensors[0].dimensions == 3, "dimensions");

  FullBatches with_a_strided_arena(Type::float32, false);
  add(with_a_strided_arena, {70, 30}, {});
  require(with_a_strided_arena.tiled.empty(), "a strided arena");
  auto& tensor = with_a_strided_arena.strided[0]->arguments.tensors[0];
  require(tensor.dimensions == 1 && tensor.shape[0] == 2100, "which is flat");
}

void test_capacity() {
  FullBatches batches(Type::bfloat16, true);
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
  FullBatches batches(Type::float32, true);
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
  test_one_launch_for_all_that_training_has();
  test_what_is_read_four_at_a_time();
  test_what_needs_a_launch_of_its_own();
  test_capacity();
  test_arrays_to_measure();
  test_refusals();
  std::printf("ok\n");
}
