"""Steps with a NaN or infinite loss or gradient: no update is made, and the step's examples are logged.

Without DeepSpeed, the gradient norm (equal on all ranks) shows it before the update. DeepSpeed silently skips
the update, except in stage 0 in fp32; there a hook checks the gradients first.

non_finite.jsonl in the run folder has a line for each such step:

    {"step": 7, "loss": null, "grad_norm": null, "action": "skip", "examples": [3, 17, 4, 9]}

`examples` are indices into the token cache, over all ranks: `t5tune inspect CACHE --example 3` shows one.
"""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version

from t5tune.compat.requirements import make_install_command
from t5tune.distributed.collectives import all_gather, get_rank_and_size
from t5tune.errors import DependencyError, TrainingError
from t5tune.io.atomic import append_line
from t5tune.progress import Note, Report
from t5tune.runs.checkpoints import list_checkpoints
from t5tune.runs.metrics_log import drop_non_finite

NON_FINITE_FILE = "non_finite.jsonl"


class NonFiniteGuard:
    """Finds non-finite steps, logs them, and either skips them or stops training.

    Args:
        max_skipped: the maximum number of steps that a run may skip, also before it resumed.
    """

    def __init__(self, run_folder: Path, skip: bool, max_skipped: int, report: Report) -> None:
        self.path = run_folder / NON_FINITE_FILE
        self.skip = skip
        self.max_skipped = max_skipped
        self.report = report
        self._engine: Any = None
        self._step_loss: Any = None
        self._num_skipped = 0  # by DeepSpeed
        self._num_skipped_by_hook = 0
        self._plain_optimizer_norm: float | None = None

    def watch(self, engine: Any) -> None:
        """Watch DeepSpeed's engine; None without DeepSpeed. Call before the first step."""
        self._engine = engine
        if engine is None:
            return
        if not hasattr(engine.optimizer, "overflow"):
            # torch's own optimizer, as in stage 0 in fp32, where DeepSpeed doesn't check the gradients
            engine.optimizer.register_step_pre_hook(self._skip_if_non_finite)
        self._num_skipped = self._count_skipped()

    def record_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Add a micro-batch's loss to the step's, and return it with a non-finite value replaced with 0.

        The Trainer would otherwise add NaN to its running mean, which would never recover.
        """
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def check(
        self, norm: Any, step: int, trained: Sequence[torch.Tensor], list_examples: Callable[[], list[int | str]]
    ) -> Any:
        """Check the gradient norm of a step, and return it as a number. Call on every rank.

        DeepSpeed has already made or skipped the update; without it, this drops non-finite gradients. A step waits for
        its GPU only here: the update depends on the norm.

        Args:
            norm: None if DeepSpeed didn't compute it: stage 0 computes it only for clipping.
            trained: the parameters that have gradients.
            list_examples: lists the step's examples, over all ranks: their indices in the cache.
        """
        norm = self._plain_optimizer_norm if norm is None else float(norm)
        loss, self._step_loss = self._step_loss, None
        if self._engine is not None:
            skipped = self._count_skipped()
            is_skipped, self._num_skipped = skipped > self._num_skipped, skipped
        elif is_skipped := not math.isfinite(norm):
            for parameter in trained:
                parameter.grad = None  # optimizers skip parameters without a gradient
        if is_skipped:
            self._handle(step, float(loss), math.inf if self._engine is not None else norm, list_examples())
        return norm

    def require_check(self) -> None:
        """Raise an error if this release of transformers skipped `check`. Call before the step's update."""
        if self._step_loss is not None:
            raise DependencyError(
                f"transformers {transformers_version}: Trainer computes the gradient norm without accelerate",
                hint=f"install a release that t5tune knows: {make_install_command('transformers')}",
            )

    def _handle(self, step: int, rank_loss: float, grad_norm: float, examples: list[int | str]) -> None:
        """Log the step, then skip it or raise."""
        losses = all_gather(rank_loss)  # all ranks get here, since the norm is the same on every rank
        loss = next((value for value in losses if not math.isfinite(value)), rank_loss)
        before = self._find_skipped_before(step)
        stops = not self.skip or len(before) >= self.max_skipped
        if get_rank_and_size()[0] == 0:
            values = drop_non_finite({"loss": loss, "grad_norm": grad_norm})
            line = {"step": step, **values, "action": "stop" if stops else "skip", "examples": examples}
            append_line(self.path, json.dumps(line))
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
        found = f"step {step}: {what}; no update was made; the batch is in {self.path}"
        if not stops:
            self.report(Note(f"{found} ({len(before) + 1} of at most {self.max_skipped} skipped)", warning=True))
            return
        if self.skip:
            found = f"{found}; max_skipped_steps: {self.max_skipped} have been skipped already"
        kept = list_checkpoints(self.path.parent)
        raise TrainingError(
            f"{found}; the last complete checkpoint is {kept[0]}" if kept else f"{found}; there is no checkpoint yet",
            hint="lower the learning rate, look at the examples with t5tune inspect, or use --on-non-finite skip",
        )

    def _count_skipped(self) -> int:
        return int(self._engine.skipped_steps) + self._num_skipped_by_hook

    def _skip_if_non_finite(self, optimizer: Any, *_: Any) -> None:
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        norm = float(torch.nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None]))
        self._plain_optimizer_norm = norm
        if not math.isfinite(norm):
            self._num_skipped_by_hook += 1
            for value in parameters:
                value.grad = None

    def _find_skipped_before(self, step: int) -> set[int]:
        # a set, because a resumed run may log a step twice
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return set()
        skipped = set()
        for text in lines:
            with contextlib.suppress(ValueError):  # a kill truncated the line
                line = json.loads(text)
                # earlier steps only: rank 0 may have appended this step before a later rank reads the file
                if line["action"] == "skip" and line["step"] < step:
                    skipped.add(line["step"])
        return skipped
