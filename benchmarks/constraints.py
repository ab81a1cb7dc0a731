"""Compare constrained replies that need no repair with free replies, on both engines.

    python benchmarks/constraints.py [--shape flan-t5-base] [--tokenizer FOLDER] [--replies 8] [--tokens 64]

Makes a model with Flan-T5's shape and random weights, whose head never prefers a special token. Its free replies are
what it writes anyway, so constraints that allow them need no repair:

- `pattern`: a regular expression that allows any text
- `choices`: 100,000 answers of random tokens, and the free replies

The ways take turns in one process with one thread, on one batch of replies of equal lengths. Prints a JSON line for
each engine: seconds of the fastest turn, the ratio to free replies (`cpu_ratio`: of CPU seconds, which say more on a
busy machine), tokens per second, and the repaired tokens.
`same` says whether the constrained replies are the free ones.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sides import write_base

from t5tune.checkpoints.pocket import pocket_folder
from t5tune.constraints import Constraint, Matcher
from t5tune.constraints.answers import Answers
from t5tune.constraints.compiler import Compiler
from t5tune.converting.ctranslate2 import convert
from t5tune.data.tokens.tokenizer import load_tokenizer
from t5tune.io.processes import count_cores
from t5tune.model.load import load_base
from t5tune.planning.known_configs import KNOWN_CONFIGS
from t5tune.serving.engines import TransformersEngine, TranslatorEngine
from t5tune.serving.generation import DecodingOptions, Generation

EOS, PAD = 1, 0
NUM_ANSWERS, ANSWER_LENGTHS = 100_000, (3, 12)


def make_model(folder: Path, shape: str, compiler: Compiler) -> Path:
    """Write a random model that never prefers a token which no constraint allows."""
    write_base(folder, KNOWN_CONFIGS[f"google/{shape}"])
    weights = load_file(folder / "model.safetensors")
    later = compiler.spellings.later
    # no incomplete characters, no blanks, no dropped spaces
    unwanted = [i for i in range(len(later)) if not (later[i] or b"").strip().decode(errors="ignore").isalpha()]
    weights["lm_head.weight"][unwanted] = 0.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def generate(engine: Any, sources: list[list[int]], num_tokens: int, matcher: Matcher | None) -> tuple[Any, int]:
    """Return replies of equal lengths, and the number of repaired tokens."""
    options = DecodingOptions(num_tokens, constraint=matcher)
    replies = [Generation(engine, source, options, lambda: None) for source in sources]

    def add(index: int, token: int) -> bool:
        replies[index].ids.append(token)
        return len(replies[index].ids) == num_tokens

    engine.generate(replies, add)
    return [reply.ids for reply in replies], sum(reply.num_repairs for reply in replies)


def compare(engine: Any, matchers: Mapping[str, Matcher | None], sources: Any, num_tokens: int, repeat: int) -> Any:
    seconds: dict[str, list[float]] = {way: [] for way in matchers}
    cpu_seconds: dict[str, list[float]] = {way: [] for way in matchers}
    replies, repairs = {}, {}
    for turn in range(repeat + 1):
        for way, matcher in matchers.items():
            started, used = time.perf_counter(), time.process_time()
            replies[way], repairs[way] = generate(engine, sources, num_tokens, matcher)
            if turn:  # the first warms up
                seconds[way].append(time.perf_counter() - started)
                cpu_seconds[way].append(time.process_time() - used)
    fastest, least = ({way: min(times) for way, times in each.items()} for each in (seconds, cpu_seconds))
    return {
        way: {
            "seconds": round(fastest[way], 3),
            "ratio": round(fastest[way] / fastest["free"], 3),
            "cpu_ratio": round(least[way] / least["free"], 3),
            "tokens_per_second": round(len(sources) * num_tokens / fastest[way], 1),
            "repairs": repairs[way],
            "same": replies[way] == replies["free"],
        }
        for way in matchers
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="flan-t5-base")
    parser.add_argument("--tokenizer", type=Path, default=pocket_folder())
    for name, default in (("--replies", 8), ("--tokens", 64), ("--repeat", 3)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    tokenizer = load_tokenizer(options.tokenizer)
    compiler = Compiler(tokenizer, 32128, [EOS])
    sources = [[*rng.integers(3, 1500, 40).tolist(), EOS] for _ in range(options.replies)]
    pattern = compiler.start(Constraint("regex", r"(.|\n)*", "regex"))
    with tempfile.TemporaryDirectory() as temporary:
        base = make_model(Path(temporary) / "base", options.shape, compiler)
        shutil.copy(options.tokenizer / "tokenizer.json", base)
        engine = TransformersEngine(load_base(base, torch.float32, torch.device("cpu")), EOS, PAD)
        free, _ = generate(engine, sources, options.tokens, None)
        lengths = rng.integers(*ANSWER_LENGTHS, NUM_ANSWERS)
        started = time.perf_counter()
        answers = Answers.sort([*free, *(rng.integers(3, 32000, size).tolist() for size in lengths)], [EOS], 32128)
        print(json.dumps({"sort_seconds": round(time.perf_counter() - started, 2)}), flush=True)
        matchers = {"free": None, "pattern": pattern, "choices": answers.start()}
        found = compare(engine, matchers, sources, options.tokens, options.repeat)
        print(json.dumps({"engine": engine.name, "shape": options.shape, **found}), flush=True)
        del engine
        (Path(temporary) / "converted").mkdir()
        convert(base, Path(temporary) / "converted", None)
        translator = TranslatorEngine(
            Path(temporary) / "converted", torch.device("cpu"), "default", frozenset([EOS]), count_cores()
        )
        found = compare(translator, matchers, sources, options.tokens, options.repeat)
        print(json.dumps({"engine": translator.name, "shape": options.shape, **found}), flush=True)


if __name__ == "__main__":
    main()
