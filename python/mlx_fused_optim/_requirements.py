"""What must hold before the compiled extension is loaded.

MLX has no stable ABI: a wrong version shows as a crash or as "incompatible
function arguments" deep in a training run. Here it shows at import, with the
command that mends it.
"""

from types import ModuleType

MLX_VERSION = "0.32.4"


def check_mlx() -> None:
    """Raise ImportError unless ``mlx.core`` loads and is the version we were built for."""
    try:
        import mlx.core as mx
    except ModuleNotFoundError as error:
        raise ImportError(
            "[mlx_fused_optim] MLX is not installed: "
            f"pip install 'mlx-fused-optim[cpu]' installs mlx {MLX_VERSION} "
            "(on Linux choose cpu, cuda12 or cuda13; macOS needs no extra)."
        ) from error
    except ImportError as error:
        # On Linux `pip install mlx` brings the Python part without libmlx.
        raise ImportError(
            f"[mlx_fused_optim] MLX is installed but does not load ({error}): on Linux "
            "it needs a backend, install one with pip install 'mlx-fused-optim[cpu]' "
            "(or [cuda12], [cuda13])."
        ) from error
    if mx.__version__ != MLX_VERSION:
        raise ImportError(
            f"[mlx_fused_optim] the wrong version of MLX: got {mx.__version__}, allowed "
            f"{MLX_VERSION} only; install it with pip install 'mlx=={MLX_VERSION}'."
        )


def load_extension() -> ModuleType:
    """Import the extension and make sure that it sees MLX's arrays."""
    import mlx.core as mx

    remedy = "pip install --force-reinstall mlx-fused-optim nanobind-backend"
    try:
        from . import _ext
    except ImportError as error:
        raise ImportError(
            f"[mlx_fused_optim] the compiled extension does not load ({error}): "
            f"reinstall it with {remedy}."
        ) from error
    try:
        _ext.Tree(mx.array(0.0), mx.array(0.0), "import")
    except TypeError as error:
        # Extensions share types only within one nanobind ABI and domain.
        raise ImportError(
            "[mlx_fused_optim] the compiled extension does not see MLX's arrays, because "
            f"their nanobind versions differ: reinstall it with {remedy}."
        ) from error
    return _ext
