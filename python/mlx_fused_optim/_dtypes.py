"""The dtypes of parameters, and their names."""

import mlx.core as mx

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: mx.Dtype) -> str:
    return _NAMES[dtype]
