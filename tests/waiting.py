"""On a GPU, a thread of MLX's own lets go of a finished step's buffers, a little after
``mx.eval`` returned. Until then a step takes fresh memory: what asks for addresses waits.
"""

import time

import mlx.core as mx


def let_go() -> None:
    """Return when MLX holds nothing of what is finished, as far as one can know."""
    mx.synchronize()
    if mx.default_device().type == mx.gpu:
        time.sleep(0.02)


def comes_true(condition) -> bool:
    """Whether it does, if one waits long enough."""
    for _ in range(1000):
        mx.synchronize()
        if condition():
            return True
        time.sleep(0.01)
    return False
