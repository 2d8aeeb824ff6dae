"""What must hold before the compiled extension is loaded.

MLX has no stable ABI: a wrong version shows as a crash or as "incompatible
function arguments" deep in a training run. Here it shows at import, with the
command that mends it.
"""

MLX_VERSION = "0.32.4"

_EXTRAS = (
    "on Linux pip install 'mlx-fused-optim[cpu]' (or [cuda12], [cuda13]), "
    "on macOS pip install mlx-fused-optim"
)
_REINSTALL = "pip install --force-reinstall mlx-fused-optim nanobind-backend"


def check_mlx() -> None:
    """Raise ImportError unless ``mlx.core`` loads and is the version we were built for."""
    try:
        import mlx.core as mx
    except ModuleNotFoundError as error:
        raise ImportError(
            f"[mlx_fused_optim] MLX is not installed ({error}): allowed is mlx "
            f"{MLX_VERSION}; install it with {_EXTRAS}."
        ) from error
    except ImportError as error:
        # On Linux `pip install mlx` brings the Python part without libmlx.
        raise ImportError(
            f"[mlx_fused_optim] MLX is installed but does not load ({error}): on Linux it "
            f"needs a backend beside it; install one: {_EXTRAS}."
        ) from error
    version = getattr(mx, "__version__", "an unknown one")
    if version != MLX_VERSION:
        raise ImportError(
            f"[mlx_fused_optim] the wrong version of MLX: got {version}, allowed "
            f"{MLX_VERSION} only; install it: {_EXTRAS}."
        )


def check_extension() -> None:
    """Raise ImportError unless the extension loads and sees MLX's arrays."""
    import mlx.core as mx

    try:
        from . import _ext
    except ImportError as error:
        raise ImportError(
            f"[mlx_fused_optim] the compiled extension does not load ({error}): "
            f"reinstall it with {_REINSTALL}."
        ) from error
    try:
        _ext.Tree(mx.array(0.0), mx.array(0.0), "import")
    except (TypeError, ValueError) as error:
        # Extensions share types only within one nanobind ABI and domain.
        raise ImportError(
            "[mlx_fused_optim] the compiled extension does not see MLX's arrays, because "
            f"their nanobind versions differ: reinstall it with {_REINSTALL}."
        ) from error
