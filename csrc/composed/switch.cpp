#include "composed/switch.h"

#include <cstdlib>
#include <string_view>

#include "graph/errors.h"

namespace mlx_fused_optim {

bool composed_is_asked_for() {
  const char* value = std::getenv("MLX_FUSED_OPTIM_COMPOSED");
  const std::string_view text = value ? value : "";
  if (text != "" && text != "0" && text != "1") {
    refuse(
        "fused_step",
        "MLX_FUSED_OPTIM_COMPOSED is not a switch: got '",
        text,
        "', allowed 0 or 1.");
  }
  return text == "1";
}

} // namespace mlx_fused_optim
