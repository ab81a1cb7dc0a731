"""A run resumes with a different number of processes: the same examples in each step, and nearly the same weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.support.processes.forks import ForkServer, RunOutput
from tests.support.processes.runs import LONG, hash_files, list_complete_steps, make_arguments
from tests.support.ranks.records import read_recorded
from tests.support.ranks.universal import read_optimizer
from tests.support.train_runs import read_metrics_lines, read_steps

pytestmark = pytest.mark.slow

BATCH = 4  # examples of a step, each of which is a micro-batch
STEPS, SAVED = 12, 6
METHODS: dict[str, tuple[str, ...]] = {
    "ddp": (),
    **{f"zero{stage}": (f"--deepspeed=zero{stage}",) for stage in range(4)},
    **{f"zero{stage}-offload": (f"--deepspeed=zero{stage}-offload",) for stage in (2, 3)},
    **{f"zero{stage}-bf16": (f"--deepspeed=zero{stage}", "--bf16") for stage in range(4)},
    **{f"zero{stage}-full": (f"--deepspeed=zero{stage}", "--train-mode=full") for stage in range(4)},
    **{f"zero{stage}-q_lora": (f"--deepspeed=zero{stage}", "--q-lora", "--no-bf16") for stage in range(4)},
    **{f"zero{stage}-groups": (f"--deepspeed=zero{stage}", "--loraplus-lr-ratio=4", "--use-dora") for stage in (2, 3)},
    **{f"zero{stage}-tokens": (f"--deepspeed=zero{stage}", "--tokens-per-batch=350") for stage in (2, 3)},
    "zero3-own": ("--weight-decay=0.1",),
}
OWN_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "sub_group_size": 700},  # several flat vectors per parameter group
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
}
SAME = [(f"{method} {method}", *ranks) for method in METHODS for ranks in ((2, 1), (2, 4), (4, 2))]
STAGES = [(f"zero{a} zero{b}", *ranks) for a in (1, 2, 3) for b in (1, 2, 3) if a != b for ranks in ((2, 2), (2, 4))]
CASES = [*SAME, *STAGES] if LONG else [("ddp ddp", 2, 1), ("zero2 zero2", 2, 1), ("zero3 zero3", 2, 1)]


@pytest.mark.parametrize(("methods", "before", "after"), CASES)
@pytest.mark.variants("zero2 zero2-2-1")
def test_resuming_on_other_ranks_keeps_optimizer_examples_and_weights(
    methods: str,
    before: int,
    after: int,
    fork_server: ForkServer,
    base_without_dropout: Path,
    conversations: Path,
    tmp_path: Path,
) -> None:
    def run(name: str, ranks: int, method: str, *calls: str) -> RunOutput:
        (tmp_path / f"{name}-steps").mkdir()
        record = f"tests.support.ranks.records:record_to({str(tmp_path / f'{name}-steps')!r})"
        flags = make_flags(ranks, method, tmp_path)
        arguments = make_arguments(base_without_dropout, conversations, tmp_path / name, *flags)
        done = fork_server.run(arguments, ranks, [record, *calls])
        assert done.codes == [0] * ranks, done.log
        return done

    first, second = methods.split()
    run("uninterrupted", before, first)
    checkpoint = copy_as_killed(tmp_path / "uninterrupted", tmp_path / "resumed")
    files = hash_files(checkpoint)
    save = f"tests.support.ranks.faults:save_after_loading({str(tmp_path / 'loaded')!r})"
    done = run("resumed", after, second, *([] if second == "ddp" else [save]))
    if first == second:
        assert f"resuming on {after} process{'es' if after > 1 else ''} from a checkpoint of {before}" in done.log
    check_same_run(tmp_path)
    assert hash_files(checkpoint) == files
    assert list_complete_steps(tmp_path / "resumed") == [STEPS, SAVED]
    assert not list((tmp_path / "resumed").glob(".*"))
    if second[:5] in {"zero1", "zero2", "zero3"}:
        check_same_optimizer(checkpoint, tmp_path / "loaded", tmp_path)


def make_flags(ranks: int, method: str, folder: Path) -> list[str]:
    """Make the flags of a run without dropout whose steps have the same micro-batches on any number of ranks."""
    flags = [*METHODS[method], "--packing=off", f"--max-steps={STEPS}", f"--save-steps={SAVED}"]
    flags += ["--per-device-train-batch-size=1", f"--gradient-accumulation-steps={BATCH // ranks}"]
    flags += ["--eval-fraction=0.1", f"--eval-steps={SAVED}", "--early-stopping-patience=9"]
    if method.endswith("-own"):
        (folder / "deepspeed.json").write_text(json.dumps(OWN_CONFIG))
        flags += [f"--deepspeed={folder / 'deepspeed.json'}"]
    return flags if method.endswith("-full") else [*flags, "--lora-dropout=0"]


def copy_as_killed(run: Path, copy: Path) -> Path:
    """Copy a finished run as if it had been killed after step SAVED. Return the checkpoint of that step."""
    shutil.copytree(run, copy)
    (copy / "result.json").unlink()
    shutil.rmtree(copy / f"checkpoint-{STEPS}")
    lines = [line for line in read_metrics_lines(run) if line["step"] <= SAVED]
    (copy / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return copy / f"checkpoint-{SAVED}"


def check_same_run(folder: Path) -> None:
    """Compare the resumed run with the uninterrupted one: its examples, learning rates, results and weights."""
    runs = [folder / "uninterrupted", folder / "resumed"]
    steps, resumed_steps = (read_recorded(folder / f"{run.name}-steps") for run in runs)
    assert {step: steps[step] for step in range(SAVED + 1, STEPS + 1)} == resumed_steps
    rates, resumed_rates = ([(line["step"], line["learning_rate"]) for line in read_steps(run)] for run in runs)
    assert rates == resumed_rates
    result, resumed_result = (json.loads((run / "result.json").read_text()) for run in runs)
    assert result["tokens"] == resumed_result["tokens"]
    assert result["train_loss"] == pytest.approx(resumed_result["train_loss"], abs=1e-3)
    states = [json.loads((run / "trainer_state.json").read_text()) for run in runs]
    assert states[0]["best_global_step"] == states[1]["best_global_step"] > 0
    name = next(path.name for path in runs[0].glob("*model.safetensors"))
    weights, resumed_weights = (load_file(run / name) for run in runs)
    assert max(abs(weights[name] - resumed_weights[name]).max() for name in weights) < 2e-3


def check_same_optimizer(checkpoint: Path, loaded: Path, folder: Path) -> None:
    """Compare a checkpoint with what an engine that has just loaded it saves, as DeepSpeed itself converts them."""
    saved, found = (
        read_optimizer(each / f"global_step{SAVED}", folder / f"universal-{number}")
        for number, each in enumerate((checkpoint, loaded))
    )
    assert len(saved["values"]) > 70
    assert saved["values"] == found["values"]
    assert saved["steps"] == found["steps"] == {SAVED}
    assert saved["groups"] == found["groups"]
