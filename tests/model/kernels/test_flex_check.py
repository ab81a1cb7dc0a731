"""Attention over packed rows: one kernel, if its results equal the loop's, and else the loop."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t5tune import TrainSettings, train
from t5tune.diagnosis import probes
from t5tune.errors import SettingsError
from t5tune.families import FAMILIES
from t5tune.model.attention import t5 as t5_attention
from t5tune.model.attention.packing import use_packing
from t5tune.model.batches import PackedCollator
from t5tune.model.kernels import flex_check as attention_check
from t5tune.model.kernels.build_tools import MissingTool
from t5tune.model.kernels.flex_attention import Blocks, attend
from t5tune.model.kernels.flex_check import (
    AttentionShape,
    KernelCheck,
    check_kernel,
    find_unmet_requirement,
    read_attention_shape,
)
from t5tune.model.load import build_empty_model
from t5tune.progress import Note
from t5tune.training import attention_choice
from t5tune.training.attention_choice import choose_packed_attention
from tests.commands.evaluate.outputs import run_evaluate
from tests.model.attention.test_packing import LENGTHS, compute_packed_loss, make_examples, make_random_model
from tests.model.kernels.test_flex_attention import pytestmark, record_compilations, without_kernels  # noqa: F401
from tests.support.models.bases import make_base

SHAPE = AttentionShape(num_heads=2, head_width=16, max_distance=128, dropout=0.1)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def choose(
    wanted: Any = "auto", previous: Any = None, device: Any = GPU, dtype: Any = torch.bfloat16, shapes: Any = (SHAPE,)
) -> tuple[str, list[Note]]:
    notes: list[Any] = []
    choice = choose_packed_attention(wanted, shapes, device, dtype, False, previous, notes.append)
    return choice.implementation, notes


@pytest.mark.long
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_check_finds_kernel_and_loop_equal(dropout: float) -> None:
    state = torch.get_rng_state()
    assert check_kernel([SHAPE._replace(dropout=dropout)], CPU, torch.float32) == KernelCheck(None, None)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.long
def test_training_compiles_again_only_for_keys_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = record_compilations(monkeypatch)
    model = make_random_model("flan-t5", torch.float32, dropout=0.1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".q.weight", ".v.weight")))  # the first layer's keys need no gradient
    use_packing(model)
    shape = AttentionShape(model.config.num_heads, model.config.d_kv, 128, model.config.dropout_rate)
    assert check_kernel([shape], CPU, torch.float32) == KernelCheck(None, None)
    assert len(compiled) == 6  # three kinds of attention, in training and in evaluation
    for lengths in (LENGTHS, LENGTHS[:3], [(1, 1)], [(300, 180)] * 7):
        compute_packed_loss(model.train(), make_examples(lengths), divides_rows=True)[0].backward()
        with torch.no_grad():
            compute_packed_loss(model.eval(), make_examples(lengths), divides_rows=True)
        assert len(compiled) == 8  # and the first layers of encoder and decoder


def attend_uncompiled(
    query: Any, key: Any, value: Any, blocks: Blocks, table: Any, is_causal: bool, dropout: float
) -> torch.Tensor:
    """Attend like the kernel, for tests of what is done with it: each graph that torch makes takes a second."""
    scores = query @ key.mT
    distance = torch.arange(scores.shape[3]) - torch.arange(scores.shape[2])[:, None]
    if table is not None:
        furthest = table.shape[1] // 2
        scores = scores + table[:, distance.clamp(-furthest, furthest) + furthest]
    is_seen = blocks.query_segments[:, None] == blocks.key_segments
    if is_causal:
        is_seen = is_seen & (distance <= 0)
    assert not dropout
    return (scores.masked_fill(~is_seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def raise_error(*_: Any) -> torch.Tensor:
    raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid\n  at line 2")


def forget_segments(query: Any, key: Any, value: Any, blocks: Blocks, *options: Any) -> torch.Tensor:
    return attend(query, key, value, replace(blocks, query_segments=blocks.query_segments.clamp_min(1)), *options)


def forget_bias(query: Any, key: Any, value: Any, blocks: Blocks, table: Any, *options: Any) -> torch.Tensor:
    return attend(query, key, value, blocks, table if table is None else 0 * table, *options)


MISTAKES: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "fails": (raise_error, "^RuntimeError: Triton Error .CUDA.: device kernel image is invalid at line 2$"),
    "segments": (forget_segments, r"the output of encoder attention differs by \d"),
    "bias": (forget_bias, "the output of encoder attention differs by"),
    "causal": (
        lambda q, k, v, blocks, table, causal, dropout: attend(q, k, v, blocks, table, False, dropout),
        "the output of decoder attention differs by",
    ),
    "dropout": (
        lambda *arguments: attend(*arguments[:-1], min(arguments[-1], 0.05)),
        "^with dropout 0.1, the output of encoder attention differs by",
    ),
    "cross": (
        lambda *arguments: attend(*arguments) * (1.01 if arguments[4] is None else 1),
        "^with dropout 0.1, the output of cross attention differs by",
    ),
    "evaluation": (
        lambda *arguments: attend(*arguments) * (1 if arguments[-1] else 1.01),
        "^with dropout 0, the output of encoder attention differs by",
    ),
    "gradient": (
        lambda q, k, v, *options: attend(q, k.detach() * 0.02 + 0.98 * k, v, *options),
        "the key's gradient of encoder attention differs by",
    ),
    "not finite": (lambda *arguments: attend(*arguments) * torch.nan, "the output of encoder attention differs by nan"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.variants("fails", "segments")
def test_a_kernel_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    wrong, message = MISTAKES[mistake]
    monkeypatch.setattr(attention_check, "attend", wrong)
    assert re.search(message, check_kernel([SHAPE], CPU, torch.float32).problem or "")


@pytest.mark.parametrize("mistake", ["fails", "bias"])
@pytest.mark.variants("bias")
def test_the_kernel_of_a_teacher_is_compared_too(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    """The teacher has different heads, and only a forward pass."""
    wrong, message = MISTAKES[mistake]
    teacher = AttentionShape(num_heads=3, head_width=32, max_distance=64, dropout=0.0, is_trained=False)
    with_gradients: list[bool] = []

    def attend_wrongly_with_wide_heads(query: Any, *arguments: Any) -> torch.Tensor:
        if query.shape[-1] == 32:
            with_gradients.append(query.requires_grad)
            return wrong(query, *arguments)
        return attend_uncompiled(query, *arguments)

    student = SHAPE._replace(dropout=0.0)
    monkeypatch.setattr(attention_check, "attend", attend_wrongly_with_wide_heads)
    assert check_kernel([student], CPU, torch.float32).problem is None
    assert re.search(message, check_kernel([student, teacher], CPU, torch.float32).problem or "")
    assert not any(with_gradients)


@pytest.mark.parametrize("fitting", [2, 1])
@pytest.mark.variants("1")
def test_too_little_shared_memory_reduces_the_stages(fitting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    needed, available = 131584, 101376
    tried: list[int | None] = []

    def attend_in_shared_memory(query: Any, key: Any, value: Any, blocks: Blocks, *options: Any) -> torch.Tensor:
        tried.append(blocks.num_stages)
        if query.shape[-1] == 32 and (blocks.num_stages is None or blocks.num_stages > fitting):
            raise RuntimeError(f"out of resource: shared memory, Required: {needed}, Hardware limit: {available}.")
        return attend_uncompiled(query, key, value, blocks, *options)

    monkeypatch.setattr(attention_check, "attend", attend_in_shared_memory)
    small, large = (SHAPE._replace(head_width=width, dropout=0.0) for width in (16, 32))
    assert check_kernel([small], CPU, torch.float32) == KernelCheck(None, None)
    assert set(tried) == {None}
    tried.clear()
    assert check_kernel([large, small], CPU, torch.float32) == KernelCheck(None, fitting)
    assert tried.count(fitting) == 12  # each kind of attention with both shapes, trained and evaluated


@pytest.mark.long
def test_the_number_of_stages_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = record_compilations(monkeypatch)
    model = make_random_model("flan-t5", torch.float32, dropout=0.0)
    use_packing(model)
    for num_stages in (None, 2, 1):
        inputs = PackedCollator(0, 0, divides_rows=True, num_stages=num_stages)(make_examples(LENGTHS))
        with torch.no_grad():
            model.eval()(**{name: value for name, value in inputs.items() if name != "labels"})
        assert len(compiled) == 3  # encoder, decoder and cross-attention
        for graph in compiled:
            (call,) = [node for node in graph.graph.nodes if node.target is torch.ops.higher_order.flex_attention]
            (options,) = [argument for argument in call.args if isinstance(argument, dict)]
            assert options.get("num_stages") == num_stages
            assert options.get("bwd_BLOCK_M1") == (32 if num_stages == 1 else None)
        compiled.clear()


@pytest.mark.usefixtures("gpu")
def test_the_run_uses_the_checked_number_of_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "check_kernel", lambda *_: KernelCheck(None, 2))
    assert choose_packed_attention("auto", [SHAPE], GPU, torch.bfloat16, False, None, lambda _: None) == ("flex", 2)


@pytest.mark.usefixtures("gpu")
def test_an_unsupported_teacher_makes_the_run_loop() -> None:
    choice, notes = choose(shapes=(SHAPE, None))
    assert choice == "loop"
    assert notes[0].text.endswith("slower on a GPU: the kernel computes only T5's attention")
    with pytest.raises(SettingsError, match="packed_attention: flex: the kernel computes only T5's attention"):
        choose("flex", shapes=(SHAPE, None))


def test_the_shape_is_read_from_the_config() -> None:
    config = {"num_heads": 3, "d_kv": 24, "dropout_rate": 0.2, "relative_attention_max_distance": 99}
    model = build_empty_model(FAMILIES["flan-t5"].bind(config), torch.float32, tied=False)
    assert read_attention_shape(model, has_dropout=True) == (3, 24, 99, 0.2, True)
    assert read_attention_shape(model, has_dropout=False) == (3, 24, 99, 0.0, True)


def test_a_cpu_uses_the_loop_silently() -> None:
    assert choose(device=CPU) == ("loop", [])
    with pytest.raises(
        SettingsError, match="^packed_attention: flex: the kernel needs an NVIDIA GPU; set it to auto or loop$"
    ):
        choose("flex", device=CPU)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that answers questions, but computes nothing."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(attention_check, "find_missing_compiler", lambda on_gpu: None)
    monkeypatch.setattr(attention_choice, "check_kernel", lambda *_: KernelCheck(None, None))


@pytest.mark.usefixtures("gpu")
def test_a_gpu_uses_one_kernel_once_it_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    choice, notes = choose()
    assert (choice, [note.text for note in notes]) == (
        "flex",
        [
            "compiling attention for this GPU, which can take minutes the first time",
            "attention over packed rows: one kernel per layer",
        ],
    )
    assert choose(previous="flex")[0] == choose("flex", previous="loop")[0] == "flex"
    # a choice by the user, or from an earlier run, compiles nothing
    monkeypatch.setattr(attention_choice, "check_kernel", raise_error)
    assert choose("loop") == ("loop", [])
    again = "as when this run began; --packed-attention flex tries one kernel per layer"
    assert choose(previous="loop") == ("loop", [Note(f"attention over packed rows loops over the examples, {again}")])


@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_a_kernel_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = "attention over packed rows loops over the examples, which is slower on a GPU"
    choice, notes = choose(dtype=torch.float32)
    assert (choice, notes) == (
        "loop", [Note(f"{slower}: the kernel computes only in bf16, which --bf16 turns on")]
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert choose()[1][0].text.endswith(": NVIDIA GeForce RTX 3060 is too old for the kernel")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"trains_bias": True}, "the kernel can't train the position bias, as full training does"),
        ({"head_width": 8}, "the kernel needs heads that are at least 16 wide; this model's are 8"),
        ({"missing": MissingTool("no C compiler", "install gcc")}, "no C compiler; install gcc"),
        ({"variable": "TORCHDYNAMO_DISABLE"}, "TORCHDYNAMO_DISABLE in the environment turns torch.compile off"),
    ],
)
def test_each_unmet_requirement_is_named(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str | None
) -> None:
    monkeypatch.setattr(attention_check, "find_missing_compiler", lambda on_gpu: changes.get("missing"))
    if "variable" in changes:
        monkeypatch.setenv(changes["variable"], "1")
    shape = SHAPE._replace(head_width=changes.get("head_width", 16))
    assert find_unmet_requirement(shape, GPU, torch.bfloat16, changes.get("trains_bias", False)) == expected


@pytest.mark.usefixtures("gpu")
def test_all_ranks_loop_if_one_lacks_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "all_gather", lambda reason: [reason, "the output differs by 30%"])
    choice, notes = choose(previous="flex")
    assert choice == "loop"
    assert [note.warning for note in notes[1:]] == [True, True]
    assert notes[1].text.endswith("slower on a GPU: rank 1: the output differs by 30%")
    assert "results may differ by rounding" in notes[2].text
    with pytest.raises(SettingsError, match="packed_attention: flex: rank 1: the output differs by 30%"):
        choose("flex")


def test_both_implementations_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_check, "TIMED_SEGMENTS", (40, 7, 90))
    seconds = attention_check.measure_implementations(SHAPE._replace(dropout=0.0), CPU, torch.float32)
    assert seconds.keys() == {"flex", "loop"}
    assert min(seconds.values()) > 0


@pytest.mark.parametrize(
    ("gate", "limit", "difference", "expected"),
    [
        ("no gcc", None, None, ("warning", "gated activations use torch's operations, which is slower: no gcc")),
        (None, "it is too old", None, ("warning", "which is slower: it is too old")),
        (None, None, "the output differs by 30%", ("warning", "it loops over the examples: the output differs by 30%")),
        (None, None, None, ("good", "in one kernel: 2.0 ms, and 60.0 ms in a loop over the examples")),
    ],
)
def test_doctor_says_which_kernels_are_used(
    monkeypatch: pytest.MonkeyPatch,
    gate: str | None,
    limit: str | None,
    difference: str | None,
    expected: tuple[str, str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(probes, "find_unmet_requirement", lambda *_, **__: limit)
    monkeypatch.setattr(probes, "check_kernel", lambda *_: KernelCheck(difference, None))
    monkeypatch.setattr(probes, "find_kernel_problem", lambda _: gate)
    monkeypatch.setattr(probes, "measure_implementations", lambda *_: {"flex": 0.002, "loop": 0.06})
    state, found, _ = probes.probe_kernels()
    assert state == expected[0]
    assert found.endswith(expected[1])


class _Calls(list[tuple[int, bool]]):
    """For each call of the kernel in a run: the width of its heads, and whether it computes gradients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, attend: Callable[..., torch.Tensor] = attend) -> None:
        self.attend = attend
        monkeypatch.setattr(
            attention_choice, "find_unmet_requirement", lambda shape, *_: "not T5's" if shape is None else None
        )
        monkeypatch.setattr(t5_attention, "flex_attend", self._attend)

    def _attend(self, query: torch.Tensor, *arguments: Any) -> torch.Tensor:
        self.append((query.shape[-1], torch.is_grad_enabled()))
        return self.attend(query, *arguments)


def make_tiny_run(data: Any, folder: Path, base: Path, **changes: Any) -> TrainSettings:
    return TrainSettings(
        model_name_or_path=str(base), data_path=data, output_dir=folder, max_steps=1, use_cpu=True, report_samples=0,
        per_device_train_batch_size=4, save_strategy="no", attention_dropout=False, **changes,
    )  # fmt: skip


def test_a_teacher_uses_the_kernel_after_comparison_with_its_heads(
    monkeypatch: pytest.MonkeyPatch, untied_base: Path, tmp_path: Path
) -> None:
    calls = _Calls(monkeypatch, attend_uncompiled)
    base = make_base(tmp_path / "base", tied=False, d_kv=16)
    teacher = make_base(tmp_path / "teacher", tied=False, num_heads=2, d_kv=32)
    pairs = [{"source": "word " * (i % 7 + 1), "target": "answer"} for i in range(8)]
    checked: list[Any] = []
    for name, problem in (("flex", None), ("loop", "the output differs by 30%")):

        def check(shapes: Any, *options: Any, problem: str | None = problem) -> KernelCheck:
            checked.extend(shapes)
            return KernelCheck(problem, None)

        monkeypatch.setattr(attention_choice, "check_kernel", check)
        settings = make_tiny_run(
            pairs, tmp_path / name, base, teacher_model_name_or_path=str(teacher), add_tokens="none"
        )
        train(settings)
        assert checked == [(4, 16, 128, 0.0, True), (2, 32, 128, 0.0, False)]
        assert {width for width, _ in calls} == ({16, 32} if name == "flex" else set())
        calls.clear()
        checked.clear()


def test_evaluate_uses_the_kernel_after_a_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = _Calls(monkeypatch)
    base = make_base(tmp_path / "base", tied=False, d_kv=16)
    texts = [json.dumps({"source": "word " * (i % 7 + 1), "target": "answer"}) for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(texts))
    checked: list[Any] = []
    losses = []
    for name, problem in (("flex", None), ("loop", "the output differs by 30%")):

        def check(shapes: Any, *options: Any, problem: str | None = problem) -> KernelCheck:
            checked.extend(shapes)
            return KernelCheck(problem, None)

        monkeypatch.setattr(attention_choice, "check_kernel", check)
        losses.append(run_evaluate(base, tmp_path / "pairs.jsonl", tmp_path / name, max_new_tokens=2).loss)
        assert checked == [(4, 16, 128, 0.0, False)]
        assert set(calls) == ({(16, False)} if name == "flex" else set())
        calls.clear()
        checked.clear()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.long
def test_reference_adapter_and_policy_use_the_same_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = _Calls(monkeypatch)
    base = make_base(tmp_path / "base", tied=False, d_kv=16)
    pairs = [{"prompt": f"{i} plus {i}?", "chosen": f"{i + i}.", "rejected": f"I think {i}"} for i in range(8)]
    for number, problem in enumerate((None, "the output differs by 30%")):
        monkeypatch.setattr(attention_choice, "check_kernel", lambda *_, problem=problem: KernelCheck(problem, None))
        first = train(make_tiny_run(pairs, tmp_path / f"first-{number}", base, objective="dpo"))
        calls.clear()
        notes: list[Any] = []
        settings = make_tiny_run(
            pairs, tmp_path / f"second-{number}", base, objective="dpo", reference_adapter=first.run
        )
        train(settings, notes.append)
        assert {has_gradients for _, has_gradients in calls} == ({True, False} if problem is None else set())
        # the policy has the same shape, so nothing is compared twice
        assert len([note for note in notes if isinstance(note, Note) and "compiling attention" in note.text]) == 1


@pytest.mark.long
def test_runs_with_kernel_and_loop_have_the_same_losses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From data to adapter, on the CPU: with evaluations, gradient accumulation and a row of padding."""
    monkeypatch.setattr(attention_choice, "find_unmet_requirement", lambda *_: None)
    pairs = [{"source": "word " * (i % 7 + 1), "target": "answer " * (i % 3 + 1)} for i in range(24)]
    found = {}
    for choice in ("flex", "loop"):
        settings = TrainSettings(
            model_name_or_path="pocket", data_path=pairs, output_dir=tmp_path / choice, max_steps=3, use_cpu=True,
            lora_dropout=0.0, gradient_accumulation_steps=2, per_device_train_batch_size=4, eval_fraction=0.2,
            learning_rate=1e-3, eval_steps=3, logging_steps=1, report_samples=0, packed_attention=choice,
        )  # fmt: skip
        result = train(settings)
        manifest = json.loads((tmp_path / choice / "checkpoint-3" / "t5tune_manifest.json").read_text())
        assert manifest["made_of"].get("packed_attention") == (choice if choice == "flex" else None)
        lines = [{name: line[name] for name in ("loss", "grad_norm") if name in line} for line in result.metrics()]
        found[choice] = [*lines, {"eval_loss": result.eval["loss"], "tokens": result.tokens}]
    assert found["flex"][0]["loss"] > 0
    for flex, loop in zip(found["flex"], found["loop"], strict=True):
        assert flex == pytest.approx(loop, rel=1e-4)
