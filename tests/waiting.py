"""On a GPU, a thread of MLX's own lets go of a finished step's buffers, some time after
``mx.eval`` returned. Until then a step takes fresh memory: what asks for addresses waits.
"""

import time

import mlx.core as mx


def let_go() -> None:
    """Return when MLX holds nothing of what is finished.

    It lets go in order: an array that only a later operation holds goes last.
    """
    mx.synchronize()
    if mx.default_device().type == mx.gpu:
        size, before = 1 << 20, mx.get_active_memory()
        mx.eval(mx.sum(mx.full(size, 1, mx.uint8)))
        assert comes_true(lambda: mx.get_active_memory() < before + size)


def comes_true(condition) -> bool:
    """Whether it does, if one waits long enough."""
    for _ in range(1000):
        mx.synchronize()
        if condition():
            return True
        time.sleep(0.01)
    return False
