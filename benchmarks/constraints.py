"""Compare constrained replies that need no repair with free replies, on both engines.

    python benchmarks/constraints.py [--shape flan-t5-base] [--tokenizer FOLDER] [--replies 8] [--tokens 64]

Makes a model with Flan-T5's shape and random weights, and trains it in plain torch until it writes one JSON reply to
every source. Constraints that allow its free replies need no repair:

- `schema`: the JSON schema of that reply
- `pattern`: a regular expression that allows any text
- `choices`: 100,000 answers of random tokens, and the free reply

The ways take turns in one process with one thread, on one batch of replies of equal lengths. Prints a JSON line for
each engine: seconds of the fastest turn, the ratio to free replies (`cpu_ratio`: of CPU seconds, which say more on a
busy machine), tokens per second, and the repaired tokens.
`same` says whether all replies are the memorized one.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sides import write_base
from transformers import AutoModelForSeq2SeqLM

from t5tune.checkpoints.pocket import pocket_folder
from t5tune.constraints import Constraint, Matcher
from t5tune.constraints.answers import Answers
from t5tune.constraints.compiler import Compiler
from t5tune.converting.ctranslate2 import convert
from t5tune.data.tokens.encoders import Beginning, make_encoder
from t5tune.data.tokens.tokenizer import load_tokenizer, save_tokenizer
from t5tune.data.tokens.vocabulary import extend_tokenizer
from t5tune.io.processes import count_cores
from t5tune.model.load import load_base
from t5tune.planning.known_configs import KNOWN_CONFIGS
from t5tune.serving.engines import TransformersEngine, TranslatorEngine
from t5tune.serving.generation import DecodingOptions, Generation

EOS, PAD = 1, 0
NUM_ROWS = 32128
MAX_LOSS = 0.01
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "orders": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "product": {"enum": ["coffee", "tea", "water"]},
                    "amount": {"type": "integer"},
                    "note": {"type": "string", "maxLength": 100},
                },
                "required": ["product", "amount"],
                "additionalProperties": False,
            },
        },
        "paid": {"type": "boolean"},
    },
    "required": ["name", "orders", "paid"],
    "additionalProperties": False,
}
REPLY = json.dumps(
    {
        "name": "Aida Lovelace",
        "orders": [
            {"product": "coffee", "amount": 6, "note": "with milk and without sugar, please"},
            {"product": "tea", "amount": 12},
        ],
        "paid": True,
    }
)
NUM_ANSWERS, ANSWER_LENGTHS = 100_000, (3, 12)


def make_model(folder: Path, shape: str, sources: list[list[int]], reply: list[int]) -> Path:
    """Write a random model that was trained until it writes this reply to each source."""
    write_base(folder, KNOWN_CONFIGS[f"google/{shape}"])
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    loss = torch.tensor(math.inf)
    while loss > MAX_LOSS:
        optimizer.zero_grad()
        loss = model(input_ids=torch.tensor(sources), labels=torch.tensor([reply] * len(sources))).loss
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def generate(engine: Any, sources: list[list[int]], num_tokens: int, matcher: Matcher | None) -> tuple[Any, int]:
    """Return the replies, and the number of repaired tokens."""
    options = DecodingOptions(num_tokens, constraint=matcher)
    replies = [Generation(engine, source, options, lambda: None) for source in sources]

    def add(index: int, token: int) -> bool:
        replies[index].ids.append(token)
        return token == EOS

    engine.generate(replies, add)
    return [reply.ids for reply in replies], sum(reply.num_repairs for reply in replies)


def compare(
    engine: Any, matchers: Mapping[str, Matcher | None], sources: list[list[int]], reply: list[int], repeat: int
) -> Any:
    seconds: dict[str, list[float]] = {way: [] for way in matchers}
    cpu_seconds: dict[str, list[float]] = {way: [] for way in matchers}
    replies, repairs = {}, {}
    for turn in range(repeat + 1):
        for way, matcher in matchers.items():
            started, used = time.perf_counter(), time.process_time()
            replies[way], repairs[way] = generate(engine, sources, len(reply), matcher)
            if turn:  # the first warms up
                seconds[way].append(time.perf_counter() - started)
                cpu_seconds[way].append(time.process_time() - used)
    fastest, least = ({way: min(times) for way, times in each.items()} for each in (seconds, cpu_seconds))
    return {
        way: {
            "seconds": round(fastest[way], 3),
            "ratio": round(fastest[way] / fastest["free"], 3),
            "cpu_ratio": round(least[way] / least["free"], 3),
            "tokens_per_second": round(len(sources) * len(reply) / fastest[way], 1),
            "repairs": repairs[way],
            "same": replies[way] == [reply] * len(sources),
        }
        for way in matchers
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="flan-t5-base")
    parser.add_argument("--tokenizer", type=Path, default=pocket_folder())
    for name, default in (("--replies", 8), ("--repeat", 3)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    tokenizer = extend_tokenizer(load_tokenizer(options.tokenizer), ["auto"], NUM_ROWS).tokenizer
    compiler = Compiler(tokenizer, NUM_ROWS, [EOS])
    schema = compiler.start(Constraint("json_schema", json.dumps(SCHEMA), "schema"))
    pattern = compiler.start(Constraint("regex", r"(.|\n)*", "regex"))
    reply = [*make_encoder(tokenizer).encode([Beginning(REPLY)])[0].tolist(), EOS]
    sources = [[*rng.integers(3, 1500, 40).tolist(), EOS] for _ in range(options.replies)]
    with tempfile.TemporaryDirectory() as temporary:
        base = make_model(Path(temporary) / "base", options.shape, sources, reply)
        save_tokenizer(tokenizer, base)
        engine = TransformersEngine(load_base(base, torch.float32, torch.device("cpu")), EOS, PAD)
        lengths = rng.integers(*ANSWER_LENGTHS, NUM_ANSWERS)
        started = time.perf_counter()
        rows = [reply[:-1], *(rng.integers(3, 32000, size).tolist() for size in lengths)]
        answers = Answers.sort(rows, [EOS], NUM_ROWS)
        print(json.dumps({"sort_seconds": round(time.perf_counter() - started, 2)}), flush=True)
        matchers = {"free": None, "schema": schema, "pattern": pattern, "choices": answers.start()}
        found = compare(engine, matchers, sources, reply, options.repeat)
        print(json.dumps({"engine": engine.name, "shape": options.shape, **found}), flush=True)
        del engine
        (Path(temporary) / "converted").mkdir()
        convert(base, Path(temporary) / "converted", None)
        translator = TranslatorEngine(
            Path(temporary) / "converted", torch.device("cpu"), "default", frozenset([EOS]), count_cores()
        )
        found = compare(translator, matchers, sources, reply, options.repeat)
        print(json.dumps({"engine": translator.name, "shape": options.shape, **found}), flush=True)


if __name__ == "__main__":
    main()
