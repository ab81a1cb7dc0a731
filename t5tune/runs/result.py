"""The result of a finished run, in result.json of its folder.

result = read_result("run")
result.adapter, result.metrics()
"""

import html
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from t5tune.compat.quiet import quiet_libraries
from t5tune.data.tokens.templates import Template, find_template
from t5tune.errors import TrainingError
from t5tune.file_names import REPORT_FILE, RESULT_FILE
from t5tune.io.atomic import write_json
from t5tune.io.reasons import describe_error
from t5tune.label_metrics import LabelTable
from t5tune.runs.metrics_log import Metrics, read_metrics
from t5tune.settings.groups.base import InferenceSettings


class RunModel(NamedTuple):
    """PEFT's model in evaluation mode, transformers' tokenizer, and the conversation template."""

    model: Any
    tokenizer: Any
    template: Template


@dataclass(frozen=True)
class TrainResult:
    """Result of train. Times in seconds, memory in bytes; `tokens` counts the source and target tokens trained on.

    Values cover the whole run, including before it was resumed, except `resumed_from`, `seconds` (wall-clock time,
    everything included) and `peak_memory_bytes`, which cover only the process that finished it. `tokens_per_second`
    excludes the time of evaluations and saves. `stopped_early` says when and why early stopping ended the run.
    `peak_reserved_bytes` is torch's reserved memory on a GPU, including `peak_memory_bytes`; None on a CPU.
    `pushed` is the URL of the repository that the result was uploaded to. `datasets` has the examples and the metrics
    of each dataset, if there are several. A metric that isn't finite is None. `best_step` is the step of the best
    evaluation, by `metric_for_best_model` or else the loss, and `best_eval` has its metrics. `eval` has the metrics of
    the weights: of the best step if the settings choose a metric, otherwise of the last step. `labels` has the
    scores of each class and the confusion matrix, if the targets are labels: of "all", and of each of several datasets.
    `lora` has LoRA's settings; None for full training.
    """

    run: Path
    adapter: Path
    steps: int
    epochs: float
    train_loss: float | None
    eval: dict[str, float | None]
    examples: int
    tokens: int
    tokens_per_second: float
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    world_size: int
    resumed_from: Path | None
    seconds: float
    stopped_early: str | None = None
    peak_reserved_bytes: int | None = None
    pushed: str | None = None
    datasets: dict[str, dict[str, float | None]] | None = None
    best_step: int | None = None
    best_eval: dict[str, float | None] | None = None
    seed: int | None = None
    split_seed: int | None = None
    lora: dict[str, Any] | None = None
    labels: dict[str, LabelTable] | None = None

    def metrics(self) -> Metrics:
        """Read the logged metrics: a dict for each logged step; `metrics.curve("loss")` has the points of a plot."""
        return read_metrics(self.run)

    def load(self, **settings: Any) -> RunModel:
        """Load the model with the adapter, its tokenizer and its conversation template, for inference.

        Args:
            settings: such as `bf16=True`, `device="cuda"` or `q_lora=True`; see InferenceSettings.

        Raises:
            SettingsError, ModelError, CheckpointError: a setting, the base or the adapter can't be used.
        """
        with quiet_libraries():
            from transformers import AutoTokenizer

            from t5tune.inference.loading import load_for_inference

            loaded = load_for_inference(InferenceSettings(model_name_or_path=str(self.run), **settings))
            tokenizer = AutoTokenizer.from_pretrained(loaded.tokenizer_folder)
        template = find_template(None, loaded.template_files)
        assert template is not None  # train has written it
        return RunModel(loaded.model, tokenizer, template)

    def _repr_html_(self) -> str | None:
        """Show the run's report page in a notebook, in a frame, because it has its own style. None: no page."""
        path = self.run / REPORT_FILE
        if not path.is_file():
            return None
        page = html.escape(path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 40em; border: 0"></iframe>'


def read_result(folder: Path | str) -> TrainResult:
    """Read the result of a finished run.

    Raises:
        TrainingError: the run hasn't finished.
    """
    path = Path(folder, RESULT_FILE)
    try:
        # earlier releases wrote NaN and infinity, which --json couldn't print
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        written = Path(values["run"])  # the folder may have been moved since
        for name in ("run", "adapter", "resumed_from"):
            if values[name] is not None:
                values[name] = path.parent / Path(values[name]).relative_to(written)
        return TrainResult(**values)
    except FileNotFoundError:
        hint = "train with the same settings to continue it"
        raise TrainingError(f"{folder}: not a finished run: it has no {path.name}", hint=hint) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: broken: {describe_error(error)}") from error


def save_pushed(result: TrainResult, url: str | None) -> TrainResult:
    """Record in a finished run's result where it was uploaded, and return the result."""
    path = result.run / RESULT_FILE
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "pushed": url})
    return replace(result, pushed=url)
