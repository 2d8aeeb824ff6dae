"""The schedules, by the name that ``mlx.optimizers`` has for their module."""

from .schedules import *  # noqa: F403
from .schedules import __all__ as __all__
