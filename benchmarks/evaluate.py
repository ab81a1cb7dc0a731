"""Compare the peak memory of evaluation and training, and the speed with transformers and on two processes.

    python benchmarks/evaluate.py --config mt5-small.json --data chats.json [--num-conversations 40] [--steps 8]
        [--num-beams 1] [--max-new-tokens N] [--model-max-length 2048] [--tokenizer FOLDER] [--vocabulary N]
    python benchmarks/evaluate.py --compare stock ...  [--batch-sizes 8 48] [--repeat 3]
    python benchmarks/evaluate.py --compare processes ...
    python benchmarks/evaluate.py --compare gathering ...

Makes a random base with the shape of a config.json (`--vocabulary` sets the number of embedding rows), prepares
the conversations, a list in a JSON file or one per line, and trains an adapter with `t5tune train`. Prints one JSON
line. By default, this is the peak memory (MB, VmHWM) of `t5tune train` and `t5tune evaluate`, in separate processes
with default settings, and the ratio of evaluate to train.

`--compare stock` generates predictions as `t5tune evaluate` does, for the run with its adapter, and with transformers'
`generate` for the merged checkpoint in batches of the given sizes, in the order of the data: seconds and CPU seconds of
the best of several turns, without loading, the ratio to transformers' best, and how many predictions are t5tune's.

`--compare processes` runs `t5tune evaluate` with one process and with two, of one thread each: seconds with start-up,
CPU seconds of all processes together, and whether the results are the same.

`--compare gathering` runs `t5tune evaluate --deepspeed zero3` on two ranks of one thread each: as it is, with the
decoder gathered once per batch, and with every weight gathered again for each token. Prints the same.
"""

import argparse
import json
import operator
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from sides import run_script, t5tune, write_base

TRAIN = """
from t5tune.cli import run
base, cache, folder, steps = arguments
run(["train", "--model-name-or-path", base, "--data-path", cache, "--output-dir", folder, "--max-steps", steps,
     "--report-samples", "0", "--quiet"])
"""
EVALUATE = """
from t5tune.cli import run
base, cache, folder, *options = arguments
run(["evaluate", "--model-name-or-path", base, "--data-path", cache, "--output-dir", folder, *options, "--quiet"])
"""
# every rank runs this in place of t5tune, as if it had no memory for the whole decoder
GATHER_FOR_EACH_TOKEN = """
import sys
from t5tune.cli import run
from t5tune.model import zero3
zero3._have_room = lambda parameters: False
run(sys.argv[1:])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compare", choices=("memory", "stock", "processes", "gathering"), default="memory")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num-conversations", type=int, default=40)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--model-max-length", type=int, default=2048)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 48])
    parser.add_argument("--repeat", type=int, default=3)
    chosen = parser.parse_args()
    compare = {
        "memory": compare_memory,
        "stock": compare_with_stock,
        "processes": compare_processes,
        "gathering": compare_gathering,
    }[chosen.compare]
    with tempfile.TemporaryDirectory() as folder:
        facts = prepare(chosen, Path(folder))
        print(json.dumps(facts | compare(chosen, Path(folder))))


def prepare(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the base and the token cache. Return the subject of the comparison."""
    config = json.loads(chosen.config.read_text())
    if chosen.vocabulary:
        config["vocab_size"] = chosen.vocabulary
    base = write_base(folder / "base", config)
    for file in chosen.tokenizer.iterdir() if chosen.tokenizer else []:
        if not file.name.startswith(("config", "generation")):
            shutil.copy(file, base)
    text = chosen.data.read_text()
    records = [json.loads(line) for line in text.splitlines()] if chosen.data.suffix == ".jsonl" else json.loads(text)
    (folder / "data.json").write_text(json.dumps(records[: chosen.num_conversations]))
    t5tune(
        "prepare", "--model-name-or-path", base, "--data-path", folder / "data.json", "--output-dir", folder / "cache",
        "--model-max-length", chosen.model_max_length,
    )  # fmt: skip
    (manifest,) = [json.loads(path.read_text()) for path in (folder / "cache").glob("*/manifest.json")]
    return {
        "config": chosen.config.name,
        "vocabulary": config["vocab_size"],
        "examples": manifest["examples"],
        "longest": [manifest[f"{side}_length"]["p100"] for side in ("source", "target")],
        "num_beams": chosen.num_beams,
    }


def list_options(chosen: argparse.Namespace) -> list[str]:
    options = ["--num-beams", str(chosen.num_beams)]
    return options + (["--max-new-tokens", str(chosen.max_new_tokens)] if chosen.max_new_tokens else [])


def compare_memory(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the peak memory of both commands."""
    base, cache = folder / "base", folder / "cache"
    train = run_script(TRAIN, [base, cache, folder / "run", str(chosen.steps)], folder / "train")
    evaluate = run_script(EVALUATE, [base, cache, folder / "scores", *list_options(chosen)], folder / "evaluate")
    ratio = round(evaluate["peak_mb"] / train["peak_mb"], 3)
    return {"train_mb": train["peak_mb"], "evaluate_mb": evaluate["peak_mb"], "ratio": ratio}


def train_adapter(folder: Path) -> Path:
    """Train two steps that change the weights, but don't teach a random base to end its replies early."""
    t5tune(
        "train", "--model-name-or-path", folder / "base", "--data-path", folder / "cache", "--output-dir",
        folder / "run", "--max-steps", 2, "--learning-rate", "1e-3", "--report-samples", 0,
    )  # fmt: skip
    return folder / "run"


def compare_with_stock(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the time of generating predictions, in turns."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForSeq2SeqLM

    from t5tune.data.caches.prepared import open_examples
    from t5tune.evaluation.scoring import find_max_target_length, generate_predictions
    from t5tune.inference.generation import Decoding
    from t5tune.inference.loading import load_for_inference
    from t5tune.settings import EvaluateSettings

    run = train_adapter(folder)
    t5tune("merge", run, "--output-dir", folder / "merged")
    ours = load_for_inference(EvaluateSettings(model_name_or_path=str(run), data_path="unused", use_cpu=True))
    stock = AutoModelForSeq2SeqLM.from_pretrained(folder / "merged", dtype="float32").eval()
    examples = list(open_examples(folder / "cache"))
    sources = [torch.tensor(example.source_S.tolist()) for example in examples]
    max_new_tokens = chosen.max_new_tokens or find_max_target_length(examples)
    tokenizer = ours.tokenizer
    decoding = Decoding(tokenizer.eos_token_id, tokenizer.pad_token_id, max_new_tokens, chosen.num_beams)

    def generate_in_batches(size: int) -> list[list[int]]:
        replies: list[list[int]] = []
        for part in (sources[start : start + size] for start in range(0, len(sources), size)):
            input_ids = pad_sequence(part, batch_first=True, padding_value=tokenizer.pad_token_id)
            mask = pad_sequence([torch.ones_like(source) for source in part], batch_first=True)
            limits = {"max_new_tokens": max_new_tokens, "num_beams": chosen.num_beams, "do_sample": False}
            rows = stock.generate(input_ids=input_ids, attention_mask=mask, **limits)[:, 1:].tolist()
            replies += [list(takewhile(lambda token: token != tokenizer.eos_token_id, row)) for row in rows]
        return replies

    sides: dict[str, Callable[[], list[list[int]]]] = {
        "t5tune": lambda: [best for (best,) in generate_predictions(ours.model, examples, decoding, None)],
        **{f"stock_{size}": lambda size=size: generate_in_batches(size) for size in chosen.batch_sizes},
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    predictions = {}
    for _ in range(chosen.repeat):
        for name, side in sides.items():
            started = time.perf_counter(), time.process_time()
            predictions[name] = side()
            seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    best = {name: [round(min(column), 2) for column in zip(*times, strict=True)] for name, times in seconds.items()}
    fastest = [min(best[name][column] for name in best if name != "t5tune") for column in (0, 1)]
    return {
        "max_new_tokens": max_new_tokens,
        "seconds_and_cpu_seconds": best,
        "ratios": [round(own / other, 3) for own, other in zip(best["t5tune"], fastest, strict=True)],
        "same": {name: sum(map(operator.eq, found, predictions["t5tune"])) for name, found in predictions.items()},
    }


def compare_processes(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the time of `t5tune evaluate` with one and with two processes."""
    command = [sys.executable, "-m", "t5tune"]
    options = {f"{count}": ["--num-processes", str(count)] for count in (1, 2)}
    return compare_evaluations(chosen, folder, {name: (command, extra) for name, extra in options.items()})


def compare_gathering(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the time of `t5tune evaluate` under ZeRO-3 with and without gathering the decoder once per batch."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    zero3 = ["--deepspeed", "zero3"]
    sides = {
        "for each token": ([*ranks, sys.executable, "-c", GATHER_FOR_EACH_TOKEN], zero3),
        "for each batch": ([*ranks, sys.executable, "-m", "t5tune"], zero3),
    }
    return compare_evaluations(chosen, folder, sides)


def compare_evaluations(
    chosen: argparse.Namespace, folder: Path, sides: dict[str, tuple[list[str], list[str]]]
) -> dict[str, Any]:
    """Run two commands of `t5tune evaluate` in turns, each with its options, and compare the fastest times."""
    run, results = train_adapter(folder), []
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, (name, (command, options)) in enumerate(chosen.repeat * [*sides.items()]):
        output = folder / f"scores-{number}"
        arguments = ["evaluate", run, "--data-path", folder / "cache", "--output-dir", output, *list_options(chosen)]
        started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            list(map(str, [*command, *arguments, *options, "--json", "--quiet"])),
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        seconds[name].append(time.perf_counter() - started)
        if done.returncode:
            sys.exit(done.stderr)
        total = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds[name].append(total.ru_utime + total.ru_stime - used.ru_utime - used.ru_stime)
        result = json.loads(done.stdout.splitlines()[-1]) | {"predictions": None, "seconds": None}
        results.append((result, (output / "predictions.jsonl").read_bytes()))
    lengths = [len(json.loads(line)["prediction"]) for line in results[0][1].splitlines()]
    if not any(lengths):
        sys.exit("all predictions are empty, so their speed says nothing: choose different data or a different shape")
    fastest = {name: round(min(times), 2) for name, times in seconds.items()}
    first, second = fastest.values()
    return {
        "characters_per_prediction": round(sum(lengths) / len(lengths)),
        "seconds": fastest,
        "cpu_seconds": {name: round(min(times), 2) for name, times in cpu_seconds.items()},
        "speedup": round(first / second, 2),
        "same": all(result == results[0] for result in results),
    }


if __name__ == "__main__":
    main()
