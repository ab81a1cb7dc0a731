"""Let Triton's interpreter, which runs kernels on a CPU, compute bf16 as a GPU does.

    os.environ["TRITON_INTERPRET"] = "1"      # before Triton is imported
    correct_bf16()

Triton 3.7 has bf16 numbers as uint16: it multiplies matrices of these integers, and truncates where a GPU rounds.
"""

from typing import Any


def correct_bf16() -> None:
    """Round conversions to bf16, and multiply matrices of bf16 numbers in fp32."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_and_round(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding)
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def widen(handle: Any) -> Any:
        return handle.data if handle.dtype.scalar != tl.bfloat16 else convert(
            handle.data, tl.bfloat16, tl.float32, None
        ).view(np.float32)  # fmt: skip

    def multiply(_: Any, a: Any, b: Any, sum_: Any, *options: Any) -> Any:
        product = np.matmul(widen(a), widen(b), dtype=sum_.data.dtype)
        return interpreter.TensorHandle(product + sum_.data, sum_.dtype.scalar)

    interpreter._convert_float = convert_and_round
    interpreter.InterpreterBuilder.create_dot = multiply
