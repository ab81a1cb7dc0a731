"""Show how the time and the memory of commands grow with their input.

    python benchmarks/scale.py [CURVE …] [--max-examples 1e7] [--output-dir scale] [--folder /tmp]

Measures prepare, the start of train, evaluate, export, merge and serve on tiny random models and made-up data, for more
and more examples, longer examples, more adapters, higher LoRA ranks and more ranks. The start of train is its first
step, resuming, or the batches of a whole epoch. Each measurement runs in a fork of one process that has imported the
libraries, so start-up doesn't count: user CPU seconds with child processes, and the peak of the anonymous memory beyond
its start (mapped files aren't counted). Models whose inputs get longer are LongT5, because T5's attention takes
quadratic time by design.

The exponent of a curve is k of a + b · size^k through its smallest size and the ends of its last decade. The goals are
exponents of at most 1.1, and constant memory where `flat` is shown. Writes scale.json, scale.md (a table) and scale.svg
to the output folder, and prints one JSON line.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from export import make_checkpoint
from growth import NOISE_MB, NOISE_SECONDS, Used, fit_exponent, measure
from merge import make_adapter
from scale_report import draw_curves, write_table
from sides import write_base

MAX_EXPONENT = 1.1
SEED = 0
VOCABULARY = 1536
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1,
      "num_heads": 2, "vocab_size": VOCABULARY}  # fmt: skip
LONGT5 = {**T5, "model_type": "longt5", "encoder_attention_type": "local", "local_radius": 31}
WIDE = {**T5, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 8}
EXAMPLES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
LENGTHS = (128, 512, 2048, 8192, 16384)
REPLIES, FILES = (30, 300, 3_000), (10, 100, 1_000, 10_000)
COUNTS = (1, 4, 8, 16, 32, 64)
SERVED = (1, 8, 32, 128, 256)  # adapters
LORA_RANKS = (8, 32, 64, 128, 256, 512)
SHORT = (4, 13)  # tokens of a source, in curves over the number of examples
NUM_LONG = 32  # examples, in curves over the length
TARGET = 3  # tokens
ROWS_AT_ONCE = 1 << 20
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Curve:
    """What is measured for growing sizes of an input.

    Args:
        make: writes the input of a size to an empty folder; not measured.
        work: what is measured, in the same folder.
        is_flat: whether the memory must not grow.
    """

    name: str
    axis: str
    sizes: Sequence[int]
    make: Callable[[Path, int], None]
    work: Callable[[Path, int], object]
    is_flat: bool = False


def list_curves(bases: Path) -> Iterator[Curve]:
    """List the curves; `bases` has the models."""
    t5, longt5, config = bases / "t5", bases / "longt5", bases / "wide" / "config.json"

    def make_examples(folder: Path, count: int) -> None:
        make_cache(folder / "cache", bases / "cache", count, SHORT)

    def make_long_examples(folder: Path, length: int) -> None:
        make_cache(folder / "cache", bases / "cache", NUM_LONG, (length - TARGET - 1, length - TARGET))

    def make_started_run(folder: Path, count: int) -> None:
        make_examples(folder, count)
        train_a_step(t5, folder)

    def make_adapters(folder: Path, count: int, lora_r: int = LORA_RANKS[0]) -> None:
        for number in range(count):
            make_adapter(folder / f"adapter-{number}", config.parent, WIDE, lora_r)

    def make_nothing(folder: Path, size: int) -> None:
        pass

    yield Curve("prepare", "examples", EXAMPLES, write_records, lambda f, _: prepare(t5, f), True)
    yield Curve("train: first step", "examples", EXAMPLES, make_examples, lambda f, _: train_a_step(t5, f))
    yield Curve("train: resuming", "examples", EXAMPLES, make_started_run, lambda f, _: train_a_step(t5, f))
    yield Curve("train: an epoch's batches", "examples", EXAMPLES, make_examples, lambda f, _: draw_batches(f, 1))
    # the predictions for 10 million examples would take 17 GB
    yield Curve("evaluate", "examples", EXAMPLES[:4], make_examples, lambda f, _: evaluate(t5 / "run", f))
    yield Curve("serve: replies", "examples", REPLIES, make_nothing, lambda _, n: serve_replies(t5, n), True)
    yield Curve("prepare", "length", LENGTHS, write_long_records, lambda f, _: prepare(t5, f), True)
    yield Curve("train: first step", "length", LENGTHS, make_long_examples, lambda f, _: train_a_step(longt5, f))
    yield Curve("evaluate", "length", LENGTHS, make_long_examples, lambda f, _: evaluate(longt5 / "run", f))
    yield Curve("serve: replies", "length", LENGTHS, make_nothing, lambda _, n: serve_replies(longt5, NUM_LONG, n))
    yield Curve("prepare", "files", FILES, write_files, lambda f, _: prepare(t5, f))  # the manifest lists the files
    yield Curve("merge", "adapters", COUNTS, make_adapters, merge, True)
    yield Curve("serve: loading", "adapters", SERVED, make_adapters, serve_adapters)
    yield Curve("merge", "LoRA rank", LORA_RANKS, lambda f, r: make_adapters(f, 1, r), lambda f, _: merge(f, 1))
    yield Curve("export", "LoRA rank", LORA_RANKS, lambda f, r: make_export(f, config, 2, r), lambda f, _: export(f))
    yield Curve("export", "ranks", COUNTS, lambda f, n: make_export(f, config, n, 64), lambda f, _: export(f), True)
    yield Curve(
        "train: an epoch's batches", "ranks", COUNTS, lambda f, _: make_examples(f, 100_000), draw_batches, True
    )  # fmt: skip


def write_records(folder: Path, count: int, text: str = "") -> None:
    """Write records; without a text for all sources, the sources are numbers in words."""
    (folder / "data").mkdir()
    with open(folder / "data" / "0.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            file.write(format_record(number, text))


def write_long_records(folder: Path, length: int) -> None:
    """Write records of about this length in tokens."""
    write_records(folder, NUM_LONG, "one two three four " * (length // 8))


def write_files(folder: Path, count: int) -> None:
    """Write a record to each file."""
    (folder / "data").mkdir()
    for number in range(count):
        (folder / "data" / f"{number}.jsonl").write_text(format_record(number), encoding="utf-8")


def format_record(number: int, text: str = "") -> str:
    """Format a record of few different words: the encoder keeps the ids of a limited number of words."""
    source = text or " ".join(WORDS[int(digit)] for digit in str(number))
    return json.dumps({"source": source, "target": str(number % 100)}) + "\n"


def make_cache(folder: Path, pattern: Path, count: int, lengths: tuple[int, int]) -> None:
    """Write a token cache like prepare's with random ids and sources of `lengths` tokens (from, below).

    Args:
        pattern: prepared data of the same base; its tokenizer and template are copied.
    """
    from t5tune.data.caches.cache import hash_files
    from t5tune.data.caches.tables import CONVERSATION_DTYPE, EXAMPLE_DTYPE

    (dataset,) = pattern.glob("*/")
    shutil.copytree(dataset, folder)
    draw, start = np.random.default_rng(SEED), 0
    with (
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "conversations.bin", "wb") as conversations,
        open(folder / "examples.bin", "wb") as examples,
    ):
        for first in range(0, count, ROWS_AT_ONCE):
            size = min(ROWS_AT_ONCE, count - first)
            sources = draw.integers(*lengths, size)
            ends = np.cumsum(sources + TARGET)
            keys, rows = np.zeros(size, CONVERSATION_DTYPE), np.zeros(size, EXAMPLE_DTYPE)
            keys["start"] = start + ends - sources - TARGET
            keys["key"] = draw.integers(0, 1 << 63, size, np.uint64)
            rows["conversation"], rows["turn"] = np.arange(first, first + size), 1
            rows["source_end"] = rows["target_start"] = sources
            rows["target_end"] = rows["answer_end"] = sources + TARGET
            rows["source_is_whole"] = rows["target_is_whole"] = rows["rejected_is_whole"] = True
            conversations.write(keys.tobytes())
            examples.write(rows.tobytes())
            tokens.write(draw.integers(10, 1000, int(ends[-1])).astype("<u2").tobytes())
            start += int(ends[-1])
    path = folder / "manifest.json"
    counts = {"conversations": count, "pairs": count, "examples": count}
    path.write_text(json.dumps({**json.loads(path.read_text()), **counts, "files": hash_files(folder)}))


def prepare(base: Path, folder: Path) -> None:
    import t5tune

    settings = t5tune.PrepareSettings(
        model_name_or_path=str(base), data_path=[str(folder / "data")], output_dir=folder / "cache",
        model_max_length=2 * LENGTHS[-1], num_workers=1,
    )  # fmt: skip
    t5tune.prepare(settings)


def train_a_step(base: Path, folder: Path, is_last: bool = False) -> None:
    """Start or resume a run, and stop it with a signal after one step, unless that is the last step."""
    import t5tune
    from t5tune.errors import Stopped
    from t5tune.progress import Measured

    is_stopping = False

    def stop(event: object) -> None:
        nonlocal is_stopping
        if isinstance(event, Measured) and not (is_last or is_stopping):
            is_stopping = True  # a second signal would end it without a checkpoint
            os.kill(os.getpid(), signal.SIGTERM)

    settings = t5tune.TrainSettings(
        model_name_or_path=str(base), data_path=[str(folder / "cache")], output_dir=folder / "run", use_cpu=True,
        logging_steps=1, report_samples=0, max_steps=1 if is_last else None,
    )  # fmt: skip
    with contextlib.suppress(Stopped):
        t5tune.train(settings, report=stop)


def draw_batches(folder: Path, num_ranks: int) -> None:
    """Draw the batches of all ranks of an epoch, as train does when it resumes at the end of an epoch."""
    from t5tune.data.caches.prepared import open_examples
    from t5tune.settings.groups.steps import StepSettings
    from t5tune.training.steps import make_sampler

    for _ in make_sampler(StepSettings(), SEED, open_examples(folder / "cache"), True, num_ranks):
        pass


def evaluate(base: Path, folder: Path) -> None:
    import t5tune

    settings = t5tune.EvaluateSettings(
        model_name_or_path=str(base), data_path=[str(folder / "cache")], output_dir=folder / "scores",
        max_new_tokens=1, device="cpu", metrics=["exact_match"],
    )  # fmt: skip
    t5tune.evaluate(settings)


def merge(folder: Path, count: int) -> None:
    import t5tune

    adapters = [folder / f"adapter-{number}" for number in range(count)]
    settings = t5tune.MergeSettings(
        adapter=adapters, weights=[1 / count] * count, output_dir=folder / "merged", verify=False
    )
    t5tune.merge(settings)


def make_export(folder: Path, config: Path, num_ranks: int, lora_r: int) -> None:
    make_checkpoint(folder / "checkpoint", config, num_ranks, lora_r)


def export(folder: Path) -> None:
    import t5tune

    t5tune.export(t5tune.ExportSettings(checkpoint=folder / "checkpoint", output_dir=folder / "exported"))


def serve_replies(base: Path, count: int, length: int = 8) -> None:
    """Serve a model, and ask it for replies of one token, one after the other."""
    import t5tune

    settings = t5tune.ServeSettings(
        models=[f"model={base}"], port=0, engine="transformers", device="cpu", model_max_length=2 * LENGTHS[-1]
    )
    body = {"model": "model", "prompt": " ".join(["one two"] * (length // 4)), "max_tokens": 1}
    with t5tune.serve(settings) as server:
        for _ in range(count):
            request = urllib.request.Request(
                f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request) as reply:
                assert json.load(reply)["choices"]


def serve_adapters(folder: Path, count: int) -> None:
    """Serve adapters of one base until they are loaded."""
    import t5tune

    models = [f"{number}={folder / f'adapter-{number}'}" for number in range(count)]
    with t5tune.serve(t5tune.ServeSettings(models=models, port=0, engine="transformers", device="cpu")):
        pass


def make_bases(folder: Path) -> None:
    """Write the models, their runs of one step, and a small token cache as the pattern of larger ones."""
    for name, config in (("t5", T5), ("longt5", LONGT5), ("wide", WIDE)):
        write_base(folder / name, config)
    write_records(folder, 10)
    prepare(folder / "t5", folder)
    for name in ("t5", "longt5"):
        shutil.copytree(folder / "cache", folder / name / "cache")
        train_a_step(folder / name, folder / name, is_last=True)


def import_libraries() -> None:
    """Import what the commands import, so that the forks have it."""
    import torch  # noqa: F401
    import transformers.trainer  # noqa: F401
    import uvicorn  # noqa: F401
    from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration  # noqa: F401

    import t5tune.commands.evaluate
    import t5tune.commands.export
    import t5tune.commands.merge
    import t5tune.commands.prepare
    import t5tune.commands.serve
    import t5tune.commands.train
    import t5tune.serving.app
    import t5tune.training.run  # noqa: F401


def measure_curve(curve: Curve, folder: Path, runs: int) -> list[Used]:
    """Measure the least that each size takes."""
    found = []
    for size in curve.sizes:
        best: Used | None = None
        for _ in range(runs):
            with tempfile.TemporaryDirectory(dir=folder) as text:
                place, log = Path(text), folder / "log"
                measure(lambda: curve.make(place, size), log)  # noqa: B023 (called at once)
                used = measure(lambda: curve.work(place, size), log)  # noqa: B023
            best = used if best is None else Used(*map(min, used, best))
        assert best is not None
        print(f"{curve.name}, {size:,} {curve.axis}: {best.seconds:.2f} s, {best.megabytes:.0f} MB", file=sys.stderr)
        found.append(best)
    return found


def describe(curve: Curve, found: Sequence[Used]) -> dict[str, Any]:
    """Describe a measured curve: its points, its exponents, and whether they reach the goals."""
    seconds, megabytes = ([round(value, 3) for value in values] for values in zip(*found, strict=True))
    time, memory = (
        fit_exponent(curve.sizes, values, noise) for values, noise in ((seconds, NOISE_SECONDS), (megabytes, NOISE_MB))
    )
    return {
        "curve": curve.name,
        "axis": curve.axis,
        "sizes": list(curve.sizes),
        "seconds": seconds,
        "mb": megabytes,
        "time_exponent": time,
        "memory_exponent": memory,
        "is_flat": curve.is_flat,
        "meets_goals": (time or 0) <= MAX_EXPONENT and (memory or 0) <= (0 if curve.is_flat else MAX_EXPONENT),
    }


def write_results(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write the results so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scale.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "scale.md").write_text(write_table(results))
    (folder / "scale.svg").write_text(draw_curves(results))


def limit_sizes(curve: Curve, most_examples: int, longest: int, most_counted: int) -> Curve:
    """Leave out the largest sizes."""
    limits = {"examples": most_examples, "files": most_examples, "length": longest, "LoRA rank": LORA_RANKS[-1]}
    limit = limits.get(curve.axis, most_counted)
    return replace(curve, sizes=[size for size in curve.sizes if size <= limit])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("curves", nargs="*", metavar="CURVE", help="such as 'prepare' or 'merge/adapters'")
    parser.add_argument("--max-examples", type=float, default=EXAMPLES[-1])
    parser.add_argument("--max-length", type=int, default=LENGTHS[-1], help="in tokens")
    parser.add_argument("--max-count", type=int, default=SERVED[-1], help="of adapters and ranks")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--output-dir", type=Path, default=Path("scale"))
    parser.add_argument("--folder", help="working folder; default: the system's temporary folder")
    chosen = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import_libraries()
    results = []
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="t5tune-scale-") as text:
        folder = Path(text)
        measure(lambda: make_bases(folder / "bases"), folder / "log")
        for curve in list_curves(folder / "bases"):
            if not chosen.curves or {curve.name, f"{curve.name}/{curve.axis}"} & {*chosen.curves}:
                curve = limit_sizes(curve, int(chosen.max_examples), chosen.max_length, chosen.max_count)
                results.append(describe(curve, measure_curve(curve, folder, chosen.runs)))
                write_results(chosen.output_dir, results)
    named = {f"{each['curve']}/{each['axis']}": each for each in results}
    exponents = {name: (each["time_exponent"], each["memory_exponent"]) for name, each in named.items()}
    missed = [name for name, each in named.items() if not each["meets_goals"]]
    print(json.dumps({"exponents": exponents, "missed": missed}))


if __name__ == "__main__":
    main()
