"""Steps with a NaN or infinite loss or gradient: no update is made, and the step's examples are logged.

Without DeepSpeed the gradient norm, which is the same on every rank, shows it before the update. DeepSpeed itself
skips such an update silently, except in stage 0 in fp32, for which the trainer checks the gradients first.

non_finite.jsonl in the run folder has a line for each such step:

    {"step": 7, "loss": null, "grad_norm": null, "action": "skip", "examples": [3, 17, 4, 9]}

`examples` are indices into the token cache, over all ranks: `t5tune inspect CACHE --example 3` shows one.
"""

import contextlib
import json
import math
from pathlib import Path

from t5tune.errors import TrainingError
from t5tune.io.atomic import append_line
from t5tune.progress import Note, Report
from t5tune.training.checkpoint import list_checkpoints

NON_FINITE_FILE = "non_finite.jsonl"


class NonFiniteGuard:
    """Logs non-finite steps, and either skips them or stops training.

    Args:
        skip: continue without an update instead of stopping.
        max_skipped: the maximum number of steps that a run may skip, resumed or not.
    """

    def __init__(self, run_folder: Path, skip: bool, max_skipped: int, report: Report) -> None:
        self.path = run_folder / NON_FINITE_FILE
        self.skip = skip
        self.max_skipped = max_skipped
        self.report = report

    def handle(self, step: int, loss: float, grad_norm: float, examples: list[int], is_writer: bool) -> None:
        """Log the step, then skip it or raise. Call on every rank; only `is_writer` appends to the file.

        Raises:
            TrainingError: names the step, the file and the last complete checkpoint.
        """
        before = self._find_skipped_before(step)
        stops = not self.skip or len(before) >= self.max_skipped
        if is_writer:
            self._log(step, loss, grad_norm, "stop" if stops else "skip", examples)
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {grad_norm}"
        found = f"step {step}: {what}; no update was made; its examples: {self.path}"
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

    def _log(self, step: int, loss: float, grad_norm: float, action: str, examples: list[int]) -> None:
        values = {"loss": _replace_non_finite(loss), "grad_norm": _replace_non_finite(grad_norm)}
        line = {"step": step, **values, "action": action, "examples": examples}
        append_line(self.path, json.dumps(line))

    def _find_skipped_before(self, step: int) -> set[int]:
        """Find the earlier steps that were skipped.

        A set, because a resumed run may log a step twice; lines that a kill has truncated are ignored.
        """
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return set()
        skipped = set()
        for text in lines:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                # earlier steps only: the writer may already have appended this one when another rank reads the file
                if line["action"] == "skip" and line["step"] < step:
                    skipped.add(line["step"])
        return skipped


def _replace_non_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
