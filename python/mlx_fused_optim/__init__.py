"""Fused optimizer steps for MLX: one kernel for the whole parameter tree.

One import line is the whole migration::

    import mlx_fused_optim as optim  # was: import mlx.optimizers as optim

    optimizer = optim.AdamW(learning_rate=optim.cosine_decay(1e-3, 1000))
"""

from ._requirements import check_extension, check_mlx

check_mlx()
check_extension()

from typing import TYPE_CHECKING

from . import distributed, functional, optimizers, schedulers, schedules
from ._describe import describe
from .distributed import *
from .functional import *
from .optimizers import *
from .scaler import GradScaler
from .schedules import *

if TYPE_CHECKING:
    from .accel import install, uninstall
    from .optimizers import FusedOptimizer as FusedOptimizer


def __getattr__(name: str) -> object:
    """What only some programs need; the base of our optimizers, which is none itself and so not
    among the classes that a program finds in ``dir``; and what ``mlx.optimizers`` has besides what
    it defines, such as ``tree_map``."""
    if name == "FusedOptimizer":
        return optimizers.FusedOptimizer
    if name in ("install", "uninstall"):
        from .accel import install, uninstall

        return install if name == "install" else uninstall
    import mlx.optimizers

    if not name.startswith("_") and hasattr(mlx.optimizers, name):
        return getattr(mlx.optimizers, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


__version__ = "0.1.0"
__all__ = ["GradScaler", "describe", "install", "optimizers", "schedulers", "uninstall"]
__all__ += distributed.__all__
__all__ += functional.__all__
__all__ += optimizers.__all__
__all__ += schedules.__all__
