"""A loss or gradient that is no finite number: no update is made, and the examples of the step are written down.

Without DeepSpeed the norm of the gradients, which is the same on every rank, tells it before the update. DeepSpeed
itself makes no update then, in silence; in stage 0 in fp32, where it would, gradients are looked at before.

non_finite.jsonl of the run folder has a line for each such step:

    {"step": 7, "loss": null, "grad_norm": null, "action": "skip", "examples": [3, 17, 4, 9]}

`examples` are numbers in the token cache, over all ranks: `t5tune inspect CACHE --example 3` shows one.
"""

import contextlib
import json
import math
from pathlib import Path

from t5tune.errors import TrainingError
from t5tune.io.atomic import append_line
from t5tune.progress import Note, Report
from t5tune.training.checkpoint import checkpoints

FILE = "non_finite.jsonl"


class NonFiniteSteps:
    """What is done about them.

    Args:
        skip: go on without an update, instead of stopping.
        most: skipped steps of a run, at most.
    """

    def __init__(self, run_folder: Path, skip: bool, most: int, report: Report) -> None:
        self.path = run_folder / FILE
        self.skip = skip
        self.most = most
        self.report = report

    def meet(self, step: int, loss: float, grad_norm: float, examples: list[int], writes: bool) -> None:
        """Write the step down, and say so or stop. Every rank comes here; the one that `writes` keeps the file.

        Raises:
            TrainingError: naming the step, the file and the last whole checkpoint.
        """
        before = self._skipped_before(step)
        stops = not self.skip or len(before) >= self.most
        if writes:
            action = "stop" if stops else "skip"
            figures = {"loss": _finite(loss), "grad_norm": _finite(grad_norm)}
            line = {"step": step, **figures, "action": action, "examples": examples}
            append_line(self.path, json.dumps(line))
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {grad_norm}"
        found = f"step {step}: {what}; no update was made; its examples: {self.path}"
        if not stops:
            self.report(Note(f"{found} ({len(before) + 1} of at most {self.most} skipped)", warning=True))
            return
        if self.skip:
            found = f"{found}; max_skipped_steps: {self.most} were skipped before"
        kept = checkpoints(self.path.parent)
        raise TrainingError(
            f"{found}; the last good checkpoint is {kept[0]}" if kept else f"{found}; there is no checkpoint yet",
            hint="lower the learning rate, look at the examples with t5tune inspect, or --on-non-finite skip",
        )

    def _skipped_before(self, step: int) -> set[int]:
        """A run that was resumed may meet a step twice, and a kill may have cut a line."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return set()
        skipped = set()
        for text in lines:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if line["action"] == "skip" and line["step"] < step:
                    skipped.add(line["step"])
        return skipped


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
