"""Optimizers that read like ``mlx.optimizers``: ours, and beside them the others as they are."""

from mlx.optimizers import Adafactor, MultiOptimizer, Optimizer, clip_grad_norm

from .adam import Adam, Adamax, AdamW
from .adaptive import AdaDelta, Adagrad, RMSprop
from .base import FusedOptimizer as FusedOptimizer
from .lion import Lion
from .muon import Muon
from .sgd import SGD

__all__ = [
    "SGD",
    "AdaDelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "MultiOptimizer",
    "Muon",
    "Optimizer",
    "RMSprop",
    "clip_grad_norm",
]
