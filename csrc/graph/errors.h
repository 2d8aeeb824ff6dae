// One form for all errors: "[op] what is wrong: what was given, what is allowed."
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "mlx/utils.h" // prints dtypes and shapes

namespace mlx_fused_optim {

/// Throws std::invalid_argument, which Python sees as ValueError.
template <typename... Parts>
[[noreturn]] void refuse(const std::string& op, const Parts&... parts) {
  std::ostringstream message;
  message << '[' << op << "] ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

} // namespace mlx_fused_optim
