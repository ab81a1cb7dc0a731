"""Take PiSSA's and OLoRA's start out of a base's weight, as PEFT does each time that it loads such an adapter.

An adapter that PEFT saved without path_initial_model_for_weight_conversion belongs to W less its own start. The start
follows from W alone, so the same decomposition gives it again (Meng et al. 2024; Büyükakyüz 2024).
"""

import numpy as np
import torch

from t5tune.checkpoints.tensors import Tensor
from t5tune.families import OVERFLOWS_FP16
from t5tune.model.load import TORCH_DTYPES, to_torch


def without_start(weight_OI: Tensor, name: str, kind: str, rank: int, scale: float) -> Tensor:
    """W - scale · B₀·A₀ in the dtype that transformers holds W in. `kind` is pissa or olora."""
    # the decomposition's last bits depend on the number of threads, and a new thread has torch's only once it asks
    torch.get_num_threads()
    stored = to_torch(weight_OI, TORCH_DTYPES[weight_OI.dtype])
    values_OI = stored.float()
    if kind == "pissa":
        u_OR, s_R, v_RI = torch.linalg.svd(values_OI, full_matrices=False)
        root = torch.diag(torch.sqrt(s_R[:rank] / scale))
        b_OR, a_RI = u_OR[:, :rank] @ root, root @ v_RI[:rank]
    else:
        q_OR, r_RI = torch.linalg.qr(values_OI)
        b_OR, a_RI = q_OR[:, :rank].contiguous(), r_RI[:rank].contiguous()
    # fp16 isn't enough for T5's wo: transformers loads it in fp32
    dtype = "F32" if weight_OI.dtype == "F16" and name.endswith(f".{OVERFLOWS_FP16}.weight") else weight_OI.dtype
    return from_torch((values_OI - scale * b_OR @ a_RI).to(TORCH_DTYPES[dtype]), dtype)


def from_torch(values: torch.Tensor, dtype: str) -> Tensor:
    """The same bits, by the dtype's name on disk."""
    values = values.contiguous()
    bits = values.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else values.numpy()
    return Tensor(dtype, bits)
