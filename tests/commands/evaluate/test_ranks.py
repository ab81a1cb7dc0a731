"""Evaluate on several ranks: the same result as one process, and all of them end if one is lost or stopped."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from t5tune.commands.evaluate import evaluate
from t5tune.commands.train import train
from t5tune.errors import SettingsError
from t5tune.progress import Event, Note
from t5tune.settings import EvaluateSettings
from tests.commands.evaluate.outputs import EVALUATED
from tests.support.paths import REPOSITORY
from tests.support.processes.command_line import CommandResult
from tests.support.processes.runs import Running, is_running, send_signal
from tests.support.train_runs import make_settings

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def run(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "run"
    train(make_settings(untied_base, conversations, folder, max_steps=2, bf16=True))
    return folder


@pytest.fixture(scope="module")
def data(conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rejected records in front of the conversations."""
    path = tmp_path_factory.mktemp("ranks") / "data.jsonl"
    path.write_text('{"conversations": 3}\n{"conversations": 4}\n' + conversations.read_text())
    return path


def make_arguments(run: Path, data: Path, output: Path, *more: Any) -> tuple[Any, ...]:
    """Make the arguments of an evaluation in five batches: neither two nor four ranks have equally many of them."""
    common = ("evaluate", run, "--data-path", data, "--output-dir", output, "--max-new-tokens", "4", "--use-cpu")
    return (*common, "--num-data", "14", "--per-device-eval-batch-size", "3", *more)


def read_json(done: CommandResult) -> dict[str, Any]:
    """Read the result, without its times and paths."""
    return {name: value for name, value in done.json.items() if name not in ("predictions", "seconds")}


def count_words(predictions: list[str], references: list[str]) -> dict[str, float]:
    """A custom metric, which only rank 0 may compute."""
    assert os.environ.get("RANK", "0") == "0"
    return {"words": float(sum(len(text.split()) for text in predictions))}


def test_any_number_of_ranks_gives_the_same_result(
    run: Path, data: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    more = ("--metric", "tests.commands.evaluate.test_ranks:count_words", "--json")
    done = {n: on_ranks(n, *make_arguments(run, data, tmp_path / str(n), *more)) for n in (1, 2, 4)}
    assert [each.code for each in done.values()] == [0, 0, 0], done[4].stderr
    for ranks in (2, 4):
        assert read_json(done[ranks]) == read_json(done[1])
        folders = [tmp_path / "1", tmp_path / str(ranks)]
        assert len({(folder / "predictions.jsonl").read_bytes() for folder in folders}) == 1
        assert done[ranks].stderr.count("2 records rejected, the first:") == 1
        assert "as in training: bf16" in done[ranks].stderr
    assert set(done[1].json["custom_metrics"]) == {"words"}


@pytest.mark.long
def test_a_partitioned_model_gives_the_same_result(
    run: Path, data: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    """Each rank has half of the weights; the sums of a forward pass are the same."""
    more = ("--compare-base", "--json")
    whole = on_ranks(1, *make_arguments(run, data, tmp_path / "whole", *more))
    parts = on_ranks(2, *make_arguments(run, data, tmp_path / "parts", *more, "--deepspeed", "zero3"))
    assert parts.code == 0, parts.stderr
    assert whole.json["base"] is not None
    assert read_json(parts) == read_json(whole)
    assert len({(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("whole", "parts")}) == 1


def fail_in_generation(what: str, rank: int | None = None) -> None:
    """Let one rank, or every rank, hang or end before it generates predictions."""
    from t5tune.commands.evaluate import texts

    generate = texts.generate_predictions

    def generate_or_fail(*arguments: Any, **options: Any) -> Any:
        if rank is None or os.environ["RANK"] == str(rank):
            if what == "exit":
                os._exit(9)
            while what == "hang":
                signal.pause()
            os.kill(os.getpid(), signal.Signals[what])
        return generate(*arguments, **options)

    texts.generate_predictions = generate_or_fail


CALL = "tests.commands.evaluate.test_ranks:fail_in_generation"


@pytest.mark.parametrize(("what", "code"), [("exit", 9), ("hang", 1)])
def test_a_lost_rank_is_named_and_other_ranks_end(
    what: str, code: int, run: Path, data: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    arguments = make_arguments(run, data, tmp_path / "scores", "--process-group-timeout", "2")
    done = on_ranks(2, *arguments, calls=[f"{CALL}({what!r}, 1)"])
    assert done.code == code
    assert done.errors[0] == "error: rank 0: rank 1 doesn't answer; run the same command again"
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize(("number", "code", "by"), [("SIGTERM", 143, " by SIGTERM"), ("SIGINT", 130, "")])
def test_a_signal_stops_all_ranks_with_its_exit_code(
    number: str, code: int, by: str, run: Path, data: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    done = on_ranks(2, *make_arguments(run, data, tmp_path / "scores"), calls=[f"{CALL}('{number}')"])
    assert done.code == code
    assert (
        done.stderr.splitlines().count(f"stopped{by} before the evaluation was complete") == 1
    )  # only rank 0 reports it
    assert not (tmp_path / "scores").exists()


def test_too_little_memory_halves_batches_without_changing_losses(
    run: Path, data: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    roomy = on_ranks(2, *make_arguments(run, data, tmp_path / "roomy", "--json"))
    call = "tests.support.ranks.faults:limit_memory(2)"
    narrow = on_ranks(2, *make_arguments(run, data, tmp_path / "narrow", "--json"), calls=[call])
    assert narrow.code == 0, narrow.stderr
    warnings = [line for line in narrow.stderr.splitlines() if "out of memory on rank" in line]
    assert warnings, narrow.stderr
    assert all(re.search(r"with 3 examples of up to .*; continuing with 2 at a time$", line) for line in warnings)
    assert read_json(narrow)["loss"] == pytest.approx(read_json(roomy)["loss"], abs=1e-5)


def start_workers(run: Path, data: Path, output: Path, *more: str, stderr: IO[bytes] | None = None) -> Running:
    arguments = map(str, make_arguments(run, data, output, "--num-processes", "2", *more))
    return Running([sys.executable, "-m", "t5tune", *arguments], output, stderr)


@pytest.mark.long
def test_the_command_starts_processes_and_rank_0_shows_the_result(
    run: Path, data: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    notes, more = tmp_path / "stderr", ("--compare-base", "--json")
    with open(notes, "wb") as stderr, start_workers(run, data, tmp_path / "scores", *more, stderr=stderr) as running:
        assert running.wait() == 0, notes.read_text()
    result = json.loads(running.log.read_text())
    alone = on_ranks(1, *make_arguments(run, data, tmp_path / "alone", *more))
    assert result["base"] is not None
    assert {**result, "predictions": None, "seconds": None} == {**alone.json, "predictions": None, "seconds": None}
    assert notes.read_text().count("as in training: bf16") == 1


@pytest.mark.long
def test_a_killed_process_ends_the_command_and_leaves_none(run: Path, data: Path, tmp_path: Path) -> None:
    with start_workers(run, data, tmp_path / "scores", "--max-new-tokens", "2000") as running:
        running.wait_until(lambda: "records rejected" in running.log.read_text())  # then it generates
        workers = running.find_workers()
        send_signal(workers[1], signal.SIGKILL)
        assert running.wait() == 1
        assert not any(map(is_running, workers))
    assert "error: rank 1 was killed by SIGKILL" in running.log.read_text()
    assert not (tmp_path / "scores").exists()


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_stops_its_processes(
    number: signal.Signals, code: int, run: Path, data: Path, tmp_path: Path
) -> None:
    with start_workers(run, data, tmp_path / "scores", "--max-new-tokens", "2000") as running:
        running.wait_until(lambda: "records rejected" in running.log.read_text())  # then it generates
        workers = running.find_workers()
        send_signal(running.process.pid, number)
        assert running.wait() == code
        assert not any(map(is_running, workers))
    assert "before the evaluation was complete" in running.log.read_text()


@pytest.mark.long
def test_torchrun_evaluates_from_the_command_line_and_from_python(run: Path, data: Path, tmp_path: Path) -> None:
    values = {"model_name_or_path": str(run), "data_path": str(data), "max_new_tokens": 4, "use_cpu": True}
    values |= {"num_data": 14, "per_device_eval_batch_size": 3}  # in bf16, another batch may round differently
    script = tmp_path / "script.py"
    script.write_text(
        "from t5tune import EvaluateSettings, evaluate\n"
        f"result = evaluate(EvaluateSettings(**{values!r}, output_dir={str(tmp_path / 'python')!r}))\n"
        "print('loss', result.loss)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "t5tune", *map(str, make_arguments(run, data, tmp_path / "command"))]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    with Running(command, tmp_path / "1", **environment) as first:
        assert first.wait() == 0, first.log.read_text()
    with Running([*torchrun, str(script)], tmp_path / "2", **environment) as second:
        assert second.wait() == 0, second.log.read_text()
    found = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("python", "command")]
    assert found[0] == found[1]
    losses = [line for line in second.log.read_text().splitlines() if line.startswith("loss")]
    assert len(losses) == 2
    assert losses[0] == losses[1]


def test_a_call_from_python_starts_no_processes(run: Path, data: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(model_name_or_path=run, data_path=data, output_dir=tmp_path / "x", num_processes=2)
    with pytest.raises(SettingsError, match=r"num_processes: 2: evaluate\(\) starts no processes") as caught:
        evaluate(settings)
    assert caught.value.hint == "start the script with torchrun --nproc-per-node 2, or run t5tune evaluate"


# ---------------------------------------------------------------- precision


def list_inherited(model: Path, data: Path, output: Path, **changes: Any) -> list[str]:
    events: list[Event] = []
    values = {"model_name_or_path": str(model), "data_path": str(data), "use_cpu": True, "num_data": 2}
    evaluate(EvaluateSettings(**values | {"max_new_tokens": 2, "output_dir": output} | changes), events.append)
    return [event.text for event in events if isinstance(event, Note) and event.text.startswith("as in training")]


def test_evaluate_uses_the_precision_and_quantization_of_training(
    untied_base: Path, conversations: Path, run: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "run"
    changes = {"q_lora": True, "quant_type": "fp4", "double_quant": False, "bf16": False, "max_steps": 1}
    train(make_settings(untied_base, conversations, trained, **changes))
    inherited = ["as in training: fp4 without double quantization, fp32"]
    assert list_inherited(trained, conversations, tmp_path / "a") == inherited
    assert list_inherited(untied_base, conversations, tmp_path / "b", adapter=trained / "checkpoint-1") == inherited
    assert list_inherited(trained, conversations, tmp_path / "c", q_lora=False) == []
    assert list_inherited(untied_base, conversations, tmp_path / "d") == []
    assert list_inherited(run, conversations, tmp_path / "e") == ["as in training: bf16"]
    assert list_inherited(run, conversations, tmp_path / "f", bf16=False) == []
    assert list_inherited(run, conversations, tmp_path / "g", bf16=None) == ["as in training: bf16"]
    losses = {
        name: [json.loads(line)["loss"] for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        for name in "abcef"
    }
    assert losses["a"] == losses["b"] != losses["c"]
    assert losses["e"] != losses["f"]
    assert "quant_type: fp4" in (tmp_path / "a" / "settings.yaml").read_text()


def test_evaluate_uses_the_precision_of_full_training(untied_base: Path, conversations: Path, tmp_path: Path) -> None:
    trained = tmp_path / "run"
    train(make_settings(untied_base, conversations, trained, train_mode="full", bf16=True, max_steps=1))
    for number, folder in enumerate((trained, trained / "checkpoint-1")):
        assert list_inherited(folder, conversations, tmp_path / str(number)) == ["as in training: bf16"]


def test_an_error_of_rank_0_is_printed_once(tmp_path: Path, on_ranks: Callable[..., CommandResult]) -> None:
    done = on_ranks(
        2, "evaluate", tmp_path / "none", "--data-path", "pocket", "--output-dir", tmp_path / "out", "--use-cpu"
    )
    assert done.code == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: model_name_or_path: {tmp_path / 'none'}: no such folder; check the path's spelling"
    ]


@pytest.mark.long
def test_two_ranks_of_zero3_evaluate_like_one_process(
    untied_base: Path, conversations: Path, tmp_path: Path, on_ranks: Callable[..., CommandResult]
) -> None:
    """With a learning rate of 0, the weights stay the base's, so all metrics must be the same."""
    held_out = tmp_path / "held_out.jsonl"
    # short predictions, because under ZeRO-3 every generated token gathers the whole model
    held_out.write_text("\n".join(sorted(conversations.read_text().splitlines(), key=len)[:7]))
    common = (
        "train", "--model-name-or-path", untied_base, "--data-path", conversations, "--eval-data-path", held_out,
        "--learning-rate", "0", "--max-steps", "1", "--eval-generate", "7", "--per-device-eval-batch-size", "2",
        "--report-samples", "0", "--use-cpu", "--json",
    )  # fmt: skip
    alone = on_ranks(1, *common, "--output-dir", tmp_path / "alone")
    ranks = on_ranks(2, *common, "--output-dir", tmp_path / "ranks", "--deepspeed", "zero3")
    assert alone.code == ranks.code == 0, ranks.stderr
    for name in EVALUATED:
        assert ranks.json["eval"][name] == pytest.approx(alone.json["eval"][name], rel=1e-4), name
