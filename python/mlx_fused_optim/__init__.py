"""Fused optimizer steps for MLX: one kernel for the whole parameter tree.

One import line is the whole migration::

    import mlx_fused_optim as optim  # was: import mlx.optimizers as optim

    optimizer = optim.AdamW(learning_rate=optim.cosine_decay(1e-3, 1000))
"""

from ._requirements import check_extension, check_mlx

check_mlx()
check_extension()

from . import optimizers, schedulers
from ._describe import describe
from .functional import (
    fused_adadelta_init,
    fused_adadelta_step,
    fused_adagrad_init,
    fused_adagrad_step,
    fused_adam_init,
    fused_adam_step,
    fused_adamax_init,
    fused_adamax_step,
    fused_adamw_init,
    fused_adamw_step,
    fused_ema,
    fused_lion_init,
    fused_lion_step,
    fused_rmsprop_init,
    fused_rmsprop_step,
    fused_sgd_init,
    fused_sgd_step,
)
from .optimizers import (
    SGD,
    AdaDelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    FusedOptimizer,
    Lion,
    MultiOptimizer,
    Muon,
    Optimizer,
    RMSprop,
    clip_grad_norm,
)
from .scaler import GradScaler
from .schedules import (
    Schedule,
    constant,
    cosine_decay,
    cosine_restarts,
    exponential_decay,
    inverse_sqrt,
    join_schedules,
    linear_schedule,
    multi_step,
    one_cycle,
    parse_schedule,
    polynomial_decay,
    scaled,
    step_decay,
    triangular,
    warmup,
    warmup_stable_decay,
)


def __getattr__(name: str) -> object:
    """What ``mlx.optimizers`` has besides what it defines, such as ``tree_map``."""
    import mlx.optimizers

    if not name.startswith("_") and hasattr(mlx.optimizers, name):
        return getattr(mlx.optimizers, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


__version__ = "0.1.0"
__all__ = [
    "SGD",
    "AdaDelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FusedOptimizer",
    "GradScaler",
    "Lion",
    "MultiOptimizer",
    "Muon",
    "Optimizer",
    "RMSprop",
    "Schedule",
    "clip_grad_norm",
    "constant",
    "cosine_decay",
    "cosine_restarts",
    "describe",
    "exponential_decay",
    "fused_adadelta_init",
    "fused_adadelta_step",
    "fused_adagrad_init",
    "fused_adagrad_step",
    "fused_adam_init",
    "fused_adam_step",
    "fused_adamax_init",
    "fused_adamax_step",
    "fused_adamw_init",
    "fused_adamw_step",
    "fused_ema",
    "fused_lion_init",
    "fused_lion_step",
    "fused_rmsprop_init",
    "fused_rmsprop_step",
    "fused_sgd_init",
    "fused_sgd_step",
    "inverse_sqrt",
    "join_schedules",
    "linear_schedule",
    "multi_step",
    "one_cycle",
    "optimizers",
    "parse_schedule",
    "polynomial_decay",
    "scaled",
    "schedulers",
    "step_decay",
    "triangular",
    "warmup",
    "warmup_stable_decay",
]
