"""The trainer's seams to transformers and DeepSpeed, and what it does in each step besides computing."""

import json
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from t5tune.commands.train import train
from t5tune.errors import DependencyError
from t5tune.settings import packaged_templates
from t5tune.training.trainer import OVERRIDDEN_METHODS, T5Trainer, check_overridden_methods
from tests.support.processes.command_line import OnRanks
from tests.support.train_runs import make_settings, read_losses, read_steps


def test_every_private_method_that_the_trainer_overrides_is_checked() -> None:
    private = {name for name in vars(T5Trainer) if name.startswith("_") and not name.startswith("__")}
    # also a public method, without which the loss of pairs would be divided by the number of tokens
    assert set(OVERRIDDEN_METHODS) == {"get_batch_samples", *(name for name in private if hasattr(Trainer, name))}
    check_overridden_methods(Trainer)


@pytest.mark.parametrize("name", OVERRIDDEN_METHODS)
def test_a_transformers_release_with_a_renamed_method_is_refused(name: str) -> None:
    renamed = type("Trainer", (), {other: getattr(Trainer, other) for other in OVERRIDDEN_METHODS if other != name})
    with pytest.raises(DependencyError, match=f"Trainer has no method {name}"):
        check_overridden_methods(renamed)


def test_a_worker_prefetches_the_given_number_of_batches(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders: list[Any] = []
    get_loader = T5Trainer.get_train_dataloader

    def record_loader(trainer: T5Trainer) -> Any:
        loaders.append(get_loader(trainer))
        return loaders[-1]

    monkeypatch.setattr(T5Trainer, "get_train_dataloader", record_loader)
    changes: dict[str, Any] = {"dataloader_num_workers": 1, "training_args": {"dataloader_prefetch_factor": 3}}
    train(make_settings(*inputs, tmp_path / "run", max_steps=1, **changes))
    assert [loader.prefetch_factor for loader in loaders] == [3]


def test_a_transformers_release_without_the_norm_check_is_refused(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a gradient that isn't finite would change the weights."""
    monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda *_: torch.tensor(1.0))
    with pytest.raises(DependencyError, match="Trainer computes the gradient norm without accelerate"):
        train(make_settings(*inputs, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "more",
    [(), ("--deepspeed", "zero3"), ("--deepspeed", "zero3", "--bf16"), ("--deepspeed", "zero2", "--bf16")],
    ids=" ".join,
)
@pytest.mark.variants("--deepspeed zero3")
def test_two_ranks_clip_the_gradient_of_all_their_partitions(
    more: tuple[str, ...], untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    """B is zero before the first step, so after it, with SGD, B's norm is the gradient's times the learning rate."""
    given = ("--model-name-or-path", untied_base, "--data-path", conversations, "--add-tokens", "none", "--use-cpu")
    given += ("--optim", "sgd", "--learning-rate", "0.5", "--lr-scheduler-type", "constant", "--max-steps", "1")
    norms = []
    for limit in ("1e-3", "0"):
        run = tmp_path / limit
        how = ("--max-grad-norm", limit, "--output-dir", run, "--report-samples", "0", *more)
        done = on_ranks(2, "train", *given, *how)
        assert done.code == 0, done.stderr[-3000:]
        weights = load_file(run / "adapter_model.safetensors")
        changed = torch.cat([value.flatten() for name, value in weights.items() if ".lora_B." in name])
        norms.append((float(changed.norm()), read_steps(run)[0].get("grad_norm")))
    precision = 1e-2 if "--bf16" in more else 1e-3
    (clipped, norm), (whole, _) = norms
    assert clipped == pytest.approx(0.5 * 1e-3, rel=precision)
    assert whole == pytest.approx(0.5 * norm, rel=precision)  # the logged norm is that before clipping
    assert whole > 10 * clipped


@pytest.mark.slow
@pytest.mark.distributed
def test_zero_3_gathers_the_head_for_the_loss_alone(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    config = packaged_templates.read_deepspeed_config("zero3")
    # otherwise DeepSpeed keeps such a small head gathered; on a CPU, nothing is gathered ahead of its use
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    found = tmp_path / "found.jsonl"
    done = on_ranks(
        2,
        *("train", "--model-name-or-path", untied_base, "--data-path", conversations, "--output-dir", tmp_path / "run"),
        *("--deepspeed", tmp_path / "zero3.json", "--max-steps", "2", "--use-cpu", "--add-tokens", "none"),
        *("--report-samples", "0"),
        calls=[f"tests.support.ranks.records:record_head_status({str(found)!r})"],
    )
    assert done.code == 0, done.stderr[-3000:]
    for rank in range(2):
        lines = [json.loads(line) for line in Path(f"{found}{rank}").read_text().splitlines()]
        assert {place for place, *_ in lines} == {"encoder", "decoder", "loss", "after"}
        for place, status, shape in lines:
            gathered = (status, shape) == ("AVAILABLE", [1536, 32])
            assert gathered == (place == "loss"), lines


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("more", [(), ("--gradient-checkpointing", "--use-dora")], ids=["lora", "dora"])
def test_zero_3_gathers_a_block_at_once_with_equal_losses(
    more: tuple[str, ...], untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: OnRanks
) -> None:
    """A hook for each of the adapters' modules would take longer than a step's computation on a fast GPU."""
    config = packaged_templates.read_deepspeed_config("zero3")
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}  # else such small weights stay gathered
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    found = tmp_path / "found.json"
    losses = []
    for way in (("--deepspeed", tmp_path / "zero3.json"), ()):
        run = tmp_path / f"run{len(way)}"
        done = on_ranks(
            2,
            *("train", "--model-name-or-path", untied_base, "--data-path", conversations, "--output-dir", run, *way),
            *("--max-steps", "4", "--logging-steps", "1", "--learning-rate", "1e-2", "--use-cpu"),
            *("--report-samples", "0", *more),
            calls=[f"tests.support.ranks.records:record_hooks({str(found)!r})"] if way else [],
        )
        assert done.code == 0, done.stderr[-3000:]
        losses.append(read_losses(run))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    hooks = json.loads(found.read_text())
    blocks = [name for name in hooks if name.rpartition(".")[0].endswith(".block")]
    assert len(blocks) == 4
    assert [name for name in hooks if any(name.startswith(f"{block}.") for block in blocks)] == []


Phase = tuple[str, int]
"""("micro", step) within a micro-step's `training_step`, else ("step", step); steps from 0."""


class HostWork(TorchDispatchMode):
    """Records where Python reads a tensor's value, for which it would wait on a GPU, and walks over modules."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.phase: Phase | None = None
        self.reads: dict[Phase | None, list[str]] = defaultdict(list)
        self.walks: Counter[Phase | None] = Counter()
        self.modes: set[bool] = set()
        run_micro_step = T5Trainer.training_step

        def note_phase(trainer: T5Trainer, *arguments: Any, **options: Any) -> Any:
            self.phase = ("micro", trainer.state.global_step)
            try:
                return run_micro_step(trainer, *arguments, **options)
            finally:
                self.phase = None
                self.modes |= {module.training for module in trainer.model.modules()}
                self.phase = ("step", trainer.state.global_step)

        def note_walks(walk: Callable[..., Any]) -> Callable[..., Any]:
            def note_walk(model: Any, *arguments: Any, **options: Any) -> Any:
                self.walks[self.phase] += len(model._modules) > 0
                return walk(model, *arguments, **options)

            return note_walk

        monkeypatch.setattr(T5Trainer, "training_step", note_phase)
        for name in ("named_children", "named_modules"):  # which all other walks call
            monkeypatch.setattr(nn.Module, name, note_walks(getattr(nn.Module, name)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            frames = (frame for frame in reversed(traceback.extract_stack()[:-1]) if "/torch/" not in frame.filename)
            frame = next(frames)
            self.reads[self.phase].append(f"{Path(frame.filename).name}:{frame.name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [{}, {"packing": "off", "gradient_checkpointing": True}, {"max_grad_norm": 0.0, "label_smoothing_factor": 0.1}],
    ids=["packed", "padded", "not clipped"],
)
@pytest.mark.variants("packed")
def test_a_step_reads_at_most_two_values(
    more: dict[str, Any], inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each read waits for all work before it. The optimizer is the one that GPUs use by default."""
    settings = make_settings(
        *inputs, tmp_path / "run", optim="adamw_torch_fused", gradient_accumulation_steps=2,
        logging_steps=2, save_steps=100, **more,
    )  # fmt: skip
    with HostWork(monkeypatch) as work:
        train(settings)
    norm, logged_loss = "non_finite.py:check", "trainer.py:_maybe_log_save_evaluate"
    assert [work.reads["micro", step] for step in range(6)] == [[]] * 6
    expected = [[norm, logged_loss], [norm, logged_loss], [norm], [norm, logged_loss], [norm]]
    assert [work.reads["step", step] for step in range(5)] == expected  # the last one saves
    # in the first step, the Trainer looks through the gradients once
    assert [work.walks["micro", step] + work.walks["step", step] for step in range(1, 5)] == [0] * 4
    assert work.modes == {True}  # the base was loaded in evaluation mode


def test_checkpointing_makes_no_gradient_of_padded_attentions_bias(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's fused kernels compute none."""
    attend, seen = functional.scaled_dot_product_attention, []

    def note_bias(*arguments: Any, attn_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(attn_mask.requires_grad)
        return attend(*arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", note_bias)
    more = {"packing": "off", "gradient_checkpointing": True, "max_steps": 1}
    train(make_settings(*inputs, tmp_path / "run", **more))
    assert len(seen) == 2 * 6  # each block's attentions, again in the backward pass
    assert not any(seen)
