// MLX's mlx/backend/cuda/lru_cache.h includes the fmt library, which MLX's wheels
// do not ship. What it uses there lies in templates that we never instantiate: a
// declaration is enough.
#pragma once

#include <string>

namespace fmt {
template <typename... Arguments>
std::string format(const char* text, Arguments&&... arguments);
} // namespace fmt
