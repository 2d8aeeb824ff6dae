// Where each tensor of a parameter tree lives: tensors of one dtype share flat
// buffers ("arenas"), so that a step is a few kernels with a few outputs each, however
// many tensors there are.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "mlx/array.h"

namespace mlx_fused_optim {

namespace mx = mlx::core;

/// Tensors start at multiples of this: the widest vector load of any backend,
/// and a whole number of cache lines on all of them.
constexpr size_t kArenaAlignment = 256;

/// An arena holds at most this share of all tensors, between these bounds, unless a single
/// tensor is larger: docs/architecture.md has the measurements. When the parameters cannot be
/// donated, a step needs one arena of extra memory at a time, not a second model; and an
/// arena waits for all its gradients, which so are together in memory. Saved states have arenas
/// of these sizes: with other ones they cannot be read.
constexpr size_t kArenaShare = 16;
constexpr size_t kSmallestArenaLimit = size_t(8) << 20;
constexpr size_t kLargestArenaLimit = size_t(128) << 20;

/// A path is the keys on the way to a tensor, each behind a byte that says what it is and that
/// no UTF-8 has. So "a.b" is not "b" in "a", nor the key "0" the first place of a list.
enum PathKey : char {
  kTextKey = '\xf8', // of a dict
  kNumberKey = '\xf9', // of a dict, an integer
  kPlaceKey = '\xfa' // in a list
};
inline bool is_path_key(char byte) {
  return byte == kTextKey || byte == kNumberKey || byte == kPlaceKey;
}

/// As mlx.utils.tree_flatten names it, for people to read: "layers.0.weight".
std::string path_name(std::string_view path);

struct TensorSpec {
  std::string path;
  mx::Shape shape;
  mx::Dtype dtype;
};

struct Arena {
  mx::Dtype dtype;
  size_t size = 0; // elements, gaps included
  std::vector<int> tensors = {}; // indices into Layout::tensors
  std::vector<mx::Shape> shapes = {}; // of each of `tensors`
  std::vector<size_t> offsets = {}; // elements, likewise
  // Of its tensors, which are the place of random bits; or that of a whole arena of which this
  // is the part that begins there (elements).
  uint64_t fingerprint = 0;
  uint32_t begin = 0;
  bool is_small = false; // its tensors have no moments in bytes
};

size_t element_count(const mx::Shape& shape);

/// The shape of an arena's flat array: {size}, or two dimensions where int32
/// could not hold one.
mx::Shape arena_shape(const Arena& arena);

/// Identifies a sequence of tensors by path, shape and dtype: the same number in
/// every process, on every platform and in later versions, because saved states
/// name their layout with it. FNV-1a, 64 bits, which goes byte by byte: made when it is asked for,
/// and not by a step that only compares.
class Fingerprint {
 public:
  /// Asks for memory for the paths of `tensors`, `bytes` in all.
  void reserve(size_t tensors, size_t bytes);
  void add(std::string_view path, const mx::Shape& shape, mx::Dtype dtype);
  uint64_t number() const;
  /// Whether these are the same tensors, however numbers fall.
  bool operator==(const Fingerprint& other) const {
    return bytes_ == other.bytes_ && ends_ == other.ends_;
  }

 private:
  std::vector<unsigned char> bytes_; // which are hashed
  std::vector<size_t> ends_; // of each tensor in it, whose dimensions could be another's path
  mutable std::optional<uint64_t> number_; // once it was asked for, under Python's lock
};

struct Layout {
  std::vector<TensorSpec> tensors;
  std::vector<std::shared_ptr<const Arena>> arenas; // shared with every step's graph
  Fingerprint fingerprint = {}; // of all tensors
  std::string name = {}; // of one that is not the usual one of its tensors
};

/// As states have it, in their keys.
std::string fingerprint_text(uint64_t number);

/// Assigns every tensor to an arena of its dtype, in order. Those of fewer elements than
/// `least_of_bytes` have arenas of their own. `limit` is that of an arena in bytes, for what is
/// no state; 0 for the usual one.
Layout make_layout(std::vector<TensorSpec> tensors, size_t least_of_bytes = 0, size_t limit = 0);

} // namespace mlx_fused_optim
