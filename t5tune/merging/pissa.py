"""Subtract the PiSSA or OLoRA initialization from a base weight, as PEFT does when it loads the adapter.

PEFT trains these adapters on W minus their initialization. Unless an adapter was saved with PEFT's
path_initial_model_for_weight_conversion, it must be merged into the same difference. The initialization depends only on
W, so the same decomposition reproduces it (Meng et al. 2024; Büyükakyüz 2024).
"""

import torch

from t5tune.checkpoints.tensor_files.tensors import Tensor
from t5tune.model.load import TORCH_DTYPES, from_torch, to_torch


def subtract_initialization(weight_OI: Tensor, kind: str, rank: int, scale: float, stays_fp32: bool) -> Tensor:
    """Compute W - scale · B₀·A₀ in the dtype that transformers loads W in.

    Args:
        kind: pissa or olora.
        stays_fp32: whether transformers loads the weight of an fp16 base in fp32.
    """
    # The decomposition's last bits depend on the number of threads. A new thread uses torch's setting only after this
    # call.
    torch.get_num_threads()
    stored = to_torch(weight_OI, TORCH_DTYPES[weight_OI.dtype])
    values_OI = stored.float()
    b_OR, a_RI = _compute_initialization(values_OI, kind, rank, scale)
    dtype = "F32" if weight_OI.dtype == "F16" and stays_fp32 else weight_OI.dtype
    return from_torch((values_OI - scale * b_OR @ a_RI).to(TORCH_DTYPES[dtype]))


def _compute_initialization(
    values_OI: torch.Tensor, kind: str, rank: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "pissa":
        u_OR, s_R, v_RI = torch.linalg.svd(values_OI, full_matrices=False)
        root = torch.diag(torch.sqrt(s_R[:rank] / scale))
        return u_OR[:, :rank] @ root, root @ v_RI[:rank]
    q_OR, r_RI = torch.linalg.qr(values_OI)
    return q_OR[:, :rank].contiguous(), r_RI[:rank].contiguous()
