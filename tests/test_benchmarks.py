"""The parts of the benchmarks that must work on any machine; the benchmarks themselves are run by hand."""

import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from t5tune.checkpoints.pocket import pocket_folder
from tests.support.paths import REPOSITORY
from tests.support.processes.command_line import t5tune

pytestmark = pytest.mark.slow

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture(scope="module")
def train() -> Iterator[Any]:
    """benchmarks/train.py as a module; the benchmarks import each other from their folder, so it is on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("train")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 conversations whose questions and answers have 1 to 50 words."""
    path = tmp_path_factory.mktemp("bench") / "conversations.jsonl"
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(200):
            turns = [{"from": who, "value": "the " * draw.randint(1, 50)} for who in ("human", "gpt")]
            file.write(json.dumps({"conversations": turns}) + "\n")
    return path


@pytest.fixture(scope="module")
def options(train: Any, conversations: Path) -> Any:
    """Options of benchmarks/train.py for a tiny run, with the base and the token cache that it makes."""
    arguments = ["--num-layers", "1", "--longest", "128", "--steps", "2", "--tokens", "512", "--batch-size", "4"]
    options = train.build_parser("Tiny.").parse_args(arguments)
    options.folder = conversations.parent
    base = train.write_base(options.folder / "base", train.make_config(options))
    made = t5tune(
        "prepare", "--model-name-or-path", base, "--data-path", conversations, "--output-dir",
        options.folder / "cache", "--model-max-length", "128",
    )  # fmt: skip
    assert made.code == 0, made.stderr
    return options


def train_stock(train: Any, way: str, options: Any, folder: Path, patch: pytest.MonkeyPatch) -> tuple[int, list[int]]:
    """Train one of the stock ways.

    Returns:
        The number of calls of sdpa, and for each batch the difference of its longest and shortest example.
    """
    calls, seen = [], {}
    attend = torch.nn.functional.scaled_dot_product_attention

    def count_call(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        return attend(*arguments, **keywords)

    def record_spreads(
        clock: Any, sources: Any, targets: Any, batches: Any, packed: bool, options: Any
    ) -> dict[str, Any]:
        seen["spreads"] = [int(np.ptp((sources + targets)[batch])) for batch in batches]
        return {}

    patch.setattr("torch.nn.functional.scaled_dot_product_attention", count_call)
    patch.setattr(train, "compute_metrics", record_spreads)
    train.run_stock(options, train.STOCK_WAYS[way], folder)
    return len(calls), seen["spreads"]


@pytest.mark.long
def test_the_trainer_contender_has_sdpa_and_batches_grouped_by_length(
    train: Any, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, spreads = train_stock(train, "trainer", options, tmp_path / "trainer", monkeypatch)
    steps = train.MIN_STOCK_BATCHES + 1
    assert len(spreads) == steps
    assert calls == 3 * steps  # a layer each of encoder and decoder: two self-attentions and a cross-attention
    random_calls, random_spreads = train_stock(train, "trainer-random", options, tmp_path / "random", monkeypatch)
    assert random_calls == calls
    # not zero: the sampler swaps the longest example of all with the one at the front
    assert np.mean(spreads[1:]) < np.mean(random_spreads[1:]) / 3


@pytest.mark.long
def test_the_fastchat_way_uses_eager_attention(
    train: Any, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, _ = train_stock(train, "fastchat", options, tmp_path / "run", monkeypatch)
    assert calls == 0


def test_selected_stock_batches_have_the_padding_share_of_the_epoch(train: Any) -> None:
    draw = np.random.default_rng(0)
    sources, targets = (np.minimum(draw.lognormal(5, 1, 2000).astype(int) + 4, 512) for _ in range(2))
    order = np.concatenate([window[np.argsort(-sources[window])] for window in draw.permutation(2000).reshape(5, 400)])
    batches = order.reshape(250, 8).tolist()

    def useful_share(batches: list[list[int]]) -> float:
        useful = sum((sources + targets)[batch].sum() for batch in batches)
        return float(useful / sum(train.count_padded_tokens(sources[batch], targets[batch]) for batch in batches))

    picked = train.spread_batches(batches, 12, sources, targets)
    assert len({tuple(batch) for batch in picked}) == 12
    assert useful_share(picked) == pytest.approx(useful_share(batches), rel=0.02)
    # the reason for the selection: the next batches of the epoch have less padding
    assert useful_share(batches[1:13]) > 1.05 * useful_share(batches)


@pytest.mark.long
def test_train_prints_the_ratio_to_the_trainer_first(conversations: Path, tmp_path: Path) -> None:
    result = run_benchmark(
        tmp_path, "train.py", "--data", conversations, "--num-layers", "1", "--longest", "128", "--steps", "2",
        "--tokens", "512", "--batch-size", "4", "--ways", "trainer", "packed",
    )  # fmt: skip
    assert next(iter(result)) == "packed_over_trainer"
    assert result["trainer"]["attention"] == "sdpa"
    assert result["trainer"]["sampler"] == "LengthGroupedSampler"
    assert result["packed"]["useful_share"] == 1
    speeds = [result[way]["tokens_per_second"] for way in ("packed", "trainer")]
    assert result["packed_over_trainer"] == round(speeds[0] / speeds[1], 2)


def test_train_compares_with_the_trainer_first_and_fastchat_second(train: Any) -> None:
    ways = train.build_parser("Defaults.").parse_args([]).ways
    speeds = {way: {"tokens_per_second": 1.0 + place} for place, way in enumerate(ways)}
    pairs = [(ours, other) for other in ("trainer", "fastchat") for ours in ("packed", "compiled", "budget")]
    assert list(train.compute_ratios(speeds)) == [f"{ours}_over_{other}" for ours, other in pairs]


@pytest.mark.parametrize(
    ("visible", "one"),
    [(None, "0"), ("0,1,2,3", "0"), ("2,3", "2"), ("3", "3"), ("", ""), ("GPU-8a,GPU-1f", "GPU-8a")],
)
def test_each_side_of_a_benchmark_sees_one_gpu(
    train: Any, monkeypatch: pytest.MonkeyPatch, visible: str | None, one: str
) -> None:
    sides = importlib.import_module("sides")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    printed = "import json, os; print(json.dumps({'seen': os.environ['CUDA_VISIBLE_DEVICES']}))"
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert sides.run_self(printed) == {"seen": one}


def test_the_gpu_benchmark_refuses_a_machine_without_a_gpu() -> None:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), "--prove"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no GPU" in line


@pytest.mark.long
def test_an_adapted_base_has_lower_losses_before_and_after_tuning(tmp_path: Path) -> None:
    (result,) = run_benchmark(tmp_path, "adapt.py", "--seeds", "0", "--steps", "200")["results"]
    for loss in ("text_loss", "tuning_loss", "question_loss"):
        assert result["adapted"][loss] < 0.9 * result["base"][loss]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with the config.json of a tiny T5."""
    shape = {"model_type": "t5", "vocab_size": 1536, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    rest = {"num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(shape | rest))
    return tmp_path


def run_benchmark(
    folder: Path, script: str, *arguments: str | Path, leaves: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Run a script in a folder. Return its last line, after checking that it leaves only some names there."""
    before = {path.name for path in folder.iterdir()}
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    left = {path.name for path in folder.iterdir()} - before
    assert {name for name in left if not name.startswith("torch")} == leaves  # torchinductor_… and torchelastic_…
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.long
def test_merge_and_peft_write_the_same_bits(tiny: Path) -> None:
    result = run_benchmark(tiny, "merge.py", "--config", "config.json", "--runs", "1")
    assert result["same_bits"]
    assert {"ours", "cp", "peft"} == result["sides"].keys()


@pytest.mark.long
@pytest.mark.parametrize("compared", ["stock", "processes", "gathering"])
def test_evaluations_that_are_compared_have_the_same_results(tiny: Path, conversations: Path, compared: str) -> None:
    result = run_benchmark(
        tiny, "evaluate.py", "--compare", compared, "--config", "config.json", "--data", conversations,
        "--num-conversations", "6", "--max-new-tokens", "5", "--repeat", "1", "--batch-sizes", "2", "6",
    )  # fmt: skip
    assert result["same"] == ({"t5tune": 6, "stock_2": 6, "stock_6": 6} if compared == "stock" else True)
    assert result["examples"] == 6


@pytest.mark.long
def test_evaluate_prints_the_memory_of_train_and_of_evaluate(tiny: Path, conversations: Path) -> None:
    result = run_benchmark(
        tiny, "evaluate.py", "--config", "config.json", "--data", conversations, "--num-conversations", "6",
        "--steps", "1", "--max-new-tokens", "5",
    )  # fmt: skip
    assert result["train_mb"] > 0
    assert result["ratio"] == round(result["evaluate_mb"] / result["train_mb"], 3)


@pytest.mark.long
def test_prepare_has_fastchat_s_example_count_and_joins_equal_parts(tmp_path: Path, conversations: Path) -> None:
    given = ("--tokenizer", pocket_folder(), "--data", conversations)
    sides = run_benchmark(tmp_path, "prepare.py", *given, "--runs", "1", "--sides", "tokenizer", "ours", "fastchat")
    assert sides["sides"]["ours"]["count"] == sides["sides"]["fastchat"]["count"] == 200
    parts = run_benchmark(tmp_path, "prepare.py", *given, "--repeat-to", "200000", "--parts", "2")
    assert parts["same"]


@pytest.mark.long
def test_the_chunked_loss_has_the_same_gradient_in_less_memory(tmp_path: Path) -> None:
    result = run_benchmark(tmp_path, "loss.py", "--tokens", "600", "--width", "64")
    assert result["chunked"]["gradient_off"] < 1e-5
    assert result["memory_share"] < 1


@pytest.mark.long
def test_a_step_on_pairs_takes_less_memory_than_two_passes(tmp_path: Path) -> None:
    lengths = ("--source", "256", "--target", "16")
    result = run_benchmark(tmp_path, "preference_steps.py", *lengths, "--steps", "1", "--rounds", "1")
    assert [each["trained"] for each in result["results"]] == ["lora", "token rows", "full"]
    for each in result["results"]:
        assert each["peak_mb"]["shared"] < each["peak_mb"]["separate"]


@pytest.mark.long
def test_parity_scores_each_method(tmp_path: Path) -> None:
    quickstart = REPOSITORY / "examples" / "quickstart"
    result = run_benchmark(
        tmp_path, "parity.py", "--train", quickstart / "train.jsonl", "--held-out", quickstart / "heldout.jsonl",
        "--seeds", "0", "--epochs", "0.05", "--num-data", "4", "--methods", "full", "QLoRA nf4 + DQ q,v",
        "LoRA q,v, no tokens added",
    )  # fmt: skip
    found = {name: each["trainable"] for name, (each,) in result["results"].items()}
    assert found == {"full": 2165248, "QLoRA nf4 + DQ q,v": 50432, "LoRA q,v, no tokens added": 46080}


@pytest.mark.long
def test_serve_prints_what_many_clients_get_and_loses_no_reply(tiny: Path) -> None:
    command = [
        sys.executable, str(BENCHMARKS / "serve.py"), "--config", "config.json", "--clients", "1", "8",
        "--seconds", "2", "--prompts", "20", "--max-tokens", "6",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tiny, timeout=500)
    assert done.returncode == 0, done.stderr
    one, eight = map(json.loads, done.stdout.splitlines())
    assert (one["clients"], one["batch"], eight["clients"]) == (1, 1, 8)
    assert one["lost"] == one["different"] == eight["lost"] == eight["different"] == 0
    assert one["first_token_ms_p50"] <= one["reply_ms_p50"]
    assert {"requests_per_second", "reply_ms_p99", "times_one_at_a_time", "of_limit"} <= eight.keys()
    assert [path.name for path in tiny.iterdir()] == ["config.json"]


@pytest.mark.long
def test_startup_compares_commands_with_their_imports(tmp_path: Path) -> None:
    result = run_benchmark(tmp_path, "startup.py", "chat", "train", "serve", "--runs", "1")
    assert result["ratio"].keys() == {"chat", "train", "serve"}
    assert result["seconds"]["imports"] < result["seconds"]["imports with Trainer"]
    assert all(ratio > 0 for ratio in result["ratio"].values())


def test_a_fitted_exponent_ignores_the_fixed_part() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        fit_exponent = importlib.import_module("growth").fit_exponent
    sizes = [10**power for power in range(3, 8)]
    for exponent in (0.5, 1, 1.5, 2):
        assert fit_exponent(sizes, [5 + size**exponent for size in sizes], noise=0.1) == pytest.approx(
            exponent, abs=0.01
        )
    assert fit_exponent(sizes, [5, 5.1, 5, 5.2, 5.3], noise=0.1) == 0  # within a tenth of the smallest
    assert fit_exponent([1, 8, 64], [1, 1.05, 65], noise=1) == pytest.approx(2, abs=0.02)  # 0.05 is noise
    assert fit_exponent(sizes[:2], [1, 2], noise=0.1) is None


@pytest.mark.long
def test_scale_fits_an_exponent_to_each_curve(tmp_path: Path) -> None:
    result = run_benchmark(
        tmp_path, "scale.py", "train: an epoch's batches", "merge/adapters", "export/ranks", "--max-examples", "1e5",
        "--max-count", "8", "--output-dir", "out", leaves=frozenset({"out"}),
    )  # fmt: skip
    curves = {"train: an epoch's batches/examples", "train: an epoch's batches/ranks", "merge/adapters", "export/ranks"}
    assert result["exponents"].keys() == curves
    assert all(memory == 0 for _, memory in result["exponents"].values())
    measured = json.loads((tmp_path / "out" / "scale.json").read_text())
    assert [each["sizes"] for each in measured] == [[1000, 10_000, 100_000], [1, 4, 8], [1, 4, 8], [1, 4, 8]]
    assert all(min(each["seconds"]) >= 0 for each in measured)
    picture, table = ((tmp_path / "out" / name).read_text() for name in ("scale.svg", "scale.md"))
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    for name in ("merge", "export"):
        assert f">{name}</text>" in picture
        assert f" | {name} | 1 – 8 | " in table


@pytest.mark.long
def test_scale_measures_every_command(tmp_path: Path) -> None:
    most = ("--max-examples", "1e3", "--max-length", "512", "--max-count", "4")
    result = run_benchmark(tmp_path, "scale.py", *most, "--output-dir", "out", leaves=frozenset({"out"}))
    commands = {name.partition("/")[0].partition(":")[0] for name in result["exponents"]}
    assert commands == {"prepare", "train", "evaluate", "export", "merge", "serve"}
