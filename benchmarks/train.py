"""Compare the training speed of Trainer and PEFT as a user sets them up today, of FastChat's setup, and of t5tune.

    python benchmarks/train.py                                   # long-tailed lengths up to 512 tokens, in fp32
    python benchmarks/train.py --longest 2048 --dtype bfloat16
    python benchmarks/train.py --data sharegpt.json

Trains LoRA on a random T5 each way in its own process, on the same examples, with one thread and the same malloc
settings, and prints one JSON line that starts with the ratios. The processes take turns, a step at a time, so that a
machine that becomes slower or faster, as virtual ones do, does so for all of them. Time is the process's CPU time; a
token is useful if it isn't padding. `of_peak` is the model FLOPs utilization: the operations that the useful tokens
need with frozen weights (forward, and the gradients of activations) per second, as a share of the speed of large matrix
products, which are computed between the turns. benchmarks/gpu.py does the same on a GPU, without turns.

The ways:

    trainer         Trainer and PEFT, sdpa attention, train_sampling_strategy="group_by_length" over source and target
    trainer-random  the same with random batches
    fastchat        Trainer and PEFT as FastChat runs them: random batches, eager attention
    budget          t5tune, padded batches with a token budget
    packed          t5tune, packed sequences without padding
    compiled        the same with --torch-compile

Trainer's loss for T5 is the mean multiplied by accumulation steps and ranks. Both are 1 here, so the loss is correct;
the speed doesn't depend on it.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from operations import MatrixProduct, count_operations, read_clock
from sides import read_process_memory, run_in_turns, t5tune, wait_for_turn, write_base

from t5tune.planning.known_configs import KNOWN_CONFIGS

# the malloc settings that t5tune uses (t5tune.model.device.keep_freed_memory), the same for all ways
CPU_ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_TOP_PAD_": "268435456"}
CPU_ENVIRONMENT |= {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class StockWay:
    """How Trainer and PEFT are set up."""

    attention: str  # attn_implementation of the model
    sampling: str  # train_sampling_strategy of TrainingArguments


STOCK_WAYS = {
    "trainer": StockWay("sdpa", "group_by_length"),
    "trainer-random": StockWay("sdpa", "random"),
    "fastchat": StockWay("eager", "random"),
}
OUR_WAYS = ("budget", "packed", "compiled")
PEERS = ("trainer", "fastchat")  # the ways that ours are compared with; the first gives the headline ratio
WAYS = (*STOCK_WAYS, *OUR_WAYS)
# minimum number of timed steps of a stock way: its batches vary greatly in size and padding
MIN_STOCK_BATCHES = 12
# q and v of the text's layers; the vision tower's have the same names
T5GEMMA2_LAYERS = r".*(text_model|decoder)\.layers\.\d+\.self_attn\.(q|v)_proj"
POCKET = Path(__file__).parents[1] / "t5tune" / "pocket"


def write_conversations(path: Path, count: int, longest: int, num_words: int | None = None) -> Path:
    """Write pairs with lengths like ShareGPT's: log-normal, with medians of 350 source and 150 target tokens.

    Args:
        num_words: number of different words; None: all that are in the built-in vocabulary.
    """
    vocabulary = json.loads((POCKET / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = vocabulary if isinstance(vocabulary, dict) else [piece for piece, _ in vocabulary]
    words = [piece[1:] for piece in pieces if piece[0] == "▁" and piece[1:].isalpha()][:num_words]
    rng = np.random.default_rng(0)
    sources = np.clip(rng.lognormal(math.log(350), 1.1, count), 8, longest).astype(int)
    targets = np.clip(rng.lognormal(math.log(150), 1.0, count), 4, longest).astype(int)
    with open(path, "w") as file:
        for source, target in zip(sources, targets, strict=True):
            turns = [("human", rng.choice(words, source)), ("gpt", rng.choice(words, target))]
            record = {"conversations": [{"from": who, "value": " ".join(text)} for who, text in turns]}
            file.write(json.dumps(record) + "\n")
    return path


class Clock:
    """Measures the seconds of the steps between the warm-up and the end: CPU time, or wall time if training on a GPU.

    On a GPU it waits only before and after all of these steps.

    Args:
        options: `on_step` is called after each step with the share of the steps that are done, and `on_end` after the
            last of them, and once more after each step that follows.
    """

    def __init__(self, options: argparse.Namespace, steps: int) -> None:
        self.on_gpu: bool = options.on_gpu
        self.warm_up: int = options.warm_up
        self.steps = steps
        self.on_step: Callable[[float], None] | None = options.on_step
        self.on_end: Callable[[], None] | None = options.on_end
        self.done = 0
        self.begun = self.seconds = 0.0

    def tick(self) -> None:
        self.done += 1
        if self.done == self.warm_up:
            self.begun = read_clock(self.on_gpu)
        if self.done == self.steps:
            self.seconds = read_clock(self.on_gpu) - self.begun
        if self.on_step is not None:
            self.on_step(self.done / self.steps)
        if self.done >= self.steps and self.on_end is not None:
            self.on_end()


def run_ours(options: argparse.Namespace, folder: Path, packing: str, **changes: Any) -> dict[str, Any]:
    """Train one of OUR_WAYS.

    Args:
        changes: further settings of `t5tune train`.
    """
    from t5tune.commands.train import train
    from t5tune.data.caches.prepared import open_examples
    from t5tune.progress import Advanced, Event, Note
    from t5tune.training.steps import EpochDraws, make_budget_sampler

    clock = Clock(options, options.steps)

    notes: list[str] = []

    def report(event: Event) -> None:
        if isinstance(event, Advanced) and event.task == "train" and event.done:
            clock.tick()
        if isinstance(event, Note):
            notes.append(event.text)

    settings = make_settings(options, folder, packing, **changes)
    train(settings, report)
    sources, targets = open_examples(options.folder / "cache").read_lengths()
    draws = EpochDraws(sources, targets, settings.seed)
    sampler = make_budget_sampler(draws, options.tokens, packing == "on", 1)
    batches = sampler.make_batches(0)[: options.steps]
    return {**compute_metrics(clock, sources, targets, batches, packing == "on", options), "notes": notes}


def make_settings(options: argparse.Namespace, folder: Path, packing: str, **changes: Any) -> Any:
    """Make the settings of `t5tune train` for a run in `folder`."""
    from t5tune.settings import TrainSettings

    values = dict(
        model_name_or_path=str(options.folder / "base"), data_path=str(options.folder / "cache"), output_dir=folder,
        tokens_per_batch=options.tokens, packing=packing, max_steps=options.steps + count_extra_steps(options),
        use_cpu=not options.on_gpu, bf16=options.dtype == "bfloat16", save_strategy="no", train_token_rows=False,
        lora_dropout=options.dropout, report_samples=0, logging_steps=1000, training_args=options.training_args,
    )  # fmt: skip
    return TrainSettings(**{**values, **changes})


def run_stock(options: argparse.Namespace, way: StockWay, folder: Path) -> dict[str, Any]:
    """Train one of STOCK_WAYS, with Hugging Face's own collator and loss: only the examples come from t5tune."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    from t5tune.data.caches.prepared import open_examples

    cache = open_examples(options.folder / "cache")
    sources, targets = cache.read_lengths()
    # about the number of steps that sees the same tokens as our ways
    num_steps = round(options.steps * options.tokens / (options.batch_size * (sources + targets).mean()))
    extra = count_extra_steps(options)
    steps = min(max(MIN_STOCK_BATCHES, num_steps) + options.warm_up, len(cache) // options.batch_size - extra)
    clock, seen = Clock(options, steps), []
    tokenizer = AutoTokenizer.from_pretrained(cache.tokenizer_folder)
    # tensor cores are fastest with multiples of 8
    pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8 if options.on_gpu else None)

    def collate(rows: list[dict[str, Any]]) -> Any:
        seen.append([row["index"] for row in rows])
        return pad([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])

    def pick(batches: list[list[int]]) -> list[list[int]]:
        warm_up, timed = batches[: options.warm_up], batches[options.warm_up : len(batches) - extra]
        picked = spread_batches(timed, steps - options.warm_up, sources, targets)
        # the extra batches are of medium size
        return warm_up + picked + [picked[len(picked) // 2]] * extra

    rows = [
        {"index": index, "input_ids": example.source_S.tolist(), "labels": example.target_T.tolist()}
        for index, example in enumerate(cache)
    ]
    trainer = make_stock_trainer(
        way, sources + targets, pick, clock, model=make_stock_model(options, way), train_dataset=rows,
        args=make_stock_arguments(options, way, folder, steps + extra), data_collator=collate,
    )  # fmt: skip
    trainer.train()
    used = {"attention": trainer.model.config._attn_implementation, "sampler": type(trainer.sampler).__name__}
    return {**used, **compute_metrics(clock, sources, targets, seen[:steps], False, options)}


def make_stock_model(options: argparse.Namespace, way: StockWay) -> Any:
    """Load the base, with PEFT's LoRA on it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSeq2SeqLM

    base = AutoModelForSeq2SeqLM.from_pretrained(
        options.folder / "base", dtype=getattr(torch, options.dtype), attn_implementation=way.attention
    )
    targets = T5GEMMA2_LAYERS if base.config.model_type == "t5gemma2" else ["q", "v"]
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=options.dropout, target_modules=targets, task_type="SEQ_2_SEQ_LM"
    )
    return get_peft_model(base, lora)


def make_stock_arguments(options: argparse.Namespace, way: StockWay, folder: Path, max_steps: int) -> Any:
    """Make the TrainingArguments of one of STOCK_WAYS."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=options.batch_size, max_steps=max_steps,
        train_sampling_strategy=way.sampling, use_cpu=not options.on_gpu, bf16=options.dtype == "bfloat16",
        optim="adamw_torch_fused" if options.on_gpu else "adamw_torch",
        tf32=True if options.on_gpu and torch.cuda.get_device_capability() >= (8, 0) else None,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1000, remove_unused_columns=False,
        log_level="error",
    )  # fmt: skip


def make_stock_trainer(
    way: StockWay, lengths: Any, pick: Callable[[list[list[int]]], list[list[int]]], clock: Clock, **arguments: Any
) -> Any:
    """Make a Trainer that trains on a selection of the batches of an epoch that its own sampler makes.

    Args:
        lengths: of the examples, in tokens of source and target.
        pick: makes the selection.
        clock: ticks after each step.
        arguments: further arguments of Trainer.
    """
    from transformers import Trainer, TrainerCallback

    class SpreadTrainer(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            self.sampler = super()._get_train_sampler(train_dataset)
            if way.sampling == "group_by_length":
                # as with a "length" column in a datasets.Dataset; without one Trainer groups only by source length
                self.sampler.lengths = lengths.tolist()
            order = list(self.sampler)
            size = self.args.per_device_train_batch_size
            whole = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
            return [index for batch in pick(whole) for index in batch]

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    return SpreadTrainer(callbacks=[Ticks()], **arguments)


def count_extra_steps(options: argparse.Namespace) -> int:
    """Count the steps after the timed ones."""
    return 0 if options.on_end is None else 1


def spread_batches(batches: list[list[int]], count: int, sources: Any, targets: Any) -> list[list[int]]:
    """Select `count` batches that represent all of them.

    Trainer sorts by length in windows of 50 batches, the longest first, so its first few batches contain only long
    examples. So the batches are sorted by size and split into equal parts, and each part is represented by the
    batch with the closest share of padding.
    """

    def count_all(batch: list[int]) -> int:
        return count_padded_tokens(sources[batch], targets[batch])

    def count_useful(batch: list[int]) -> int:
        return int(sources[batch].sum() + targets[batch].sum())

    by_size = sorted(batches, key=count_all)
    cuts = [round(len(by_size) * place / count) for place in range(count + 1)]
    picked = []
    for start, end in itertools.pairwise(cuts):
        part = by_size[start:end]
        share = sum(map(count_useful, part)) / sum(map(count_all, part))
        picked.append(min(part, key=lambda batch: abs(count_useful(batch) / count_all(batch) - share)))
    return picked


def count_padded_tokens(sources: Any, targets: Any) -> int:
    """Count the tokens of a padded batch with these lengths, padding included."""
    return len(sources) * int(sources.max() + targets.max())


def compute_metrics(
    clock: Clock, sources: Any, targets: Any, batches: list[Any], packed: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Compute the useful tokens per second, their share of all tokens, and the operations that each of them needs."""
    peak_memory = torch.cuda.max_memory_allocated() if options.on_gpu else read_process_memory("VmHWM")
    lengths = [(sources[batch], targets[batch]) for batch in batches[options.warm_up :]]
    useful = sum(int(source.sum() + target.sum()) for source, target in lengths)
    computed = useful
    if not packed:
        computed = sum(count_padded_tokens(source, target) for source, target in lengths)
    operations = sum(count_operations(source, target, make_config(options)) for source, target in lengths)
    return {
        "useful_tokens": useful,
        "useful_share": round(useful / computed, 3),
        "seconds": round(clock.seconds, 2),
        "tokens_per_second": round(useful / clock.seconds, 1),
        "operations_per_token": round(operations / useful),
        "peak_memory_mb": peak_memory // 10**6,
    }


def make_config(options: argparse.Namespace) -> dict[str, Any]:
    """Return the base's config.json with the requested number of layers, dropout and other changes."""
    shape = {**KNOWN_CONFIGS[options.size], "dropout_rate": options.dropout, **options.shape}
    if options.num_layers is not None:
        shape |= {"num_layers": options.num_layers, "num_decoder_layers": options.num_layers}
    return shape


def compare(options: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """Run all ways in turn. The result starts with the speedup of each of our ways over its peers."""
    names = ("size", "num_layers", "longest", "dtype", "dropout", "steps", "tokens", "batch_size")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    settings["data"] = options.data.name if options.data else "synthetic"
    torch.set_num_threads(1)
    product = MatrixProduct(options)
    with tempfile.TemporaryDirectory(prefix="t5tune-bench-") as name:
        folder = Path(name)
        base = write_base(folder / "base", make_config(options))
        data = options.data or write_conversations(folder / "made_up.jsonl", 2000, options.longest)
        t5tune(
            "prepare", "--model-name-or-path", base, "--data-path", data, "--output-dir", folder / "cache",
            "--model-max-length", options.longest,
        )  # fmt: skip
        arguments = {way: [*sys.argv[1:], "--way", way, "--folder", folder] for way in options.ways}
        results = run_in_turns(arguments, environment, product.compute)
    for result in results.values():
        result["of_peak"] = product.compute_share(result, sum(product.seconds) / len(product.seconds))
    return {**compute_ratios(results), **settings, **results}


def compute_ratios(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Compute the speedups, the headline first: packed sequences over the well-configured Trainer."""
    speeds = {way: result["tokens_per_second"] for way, result in results.items()}
    return {
        f"{way}_over_{peer}": round(speeds[way] / speeds[peer], 2)
        for peer in PEERS
        for way in ("packed", "compiled", "budget")
        if {way, peer} <= speeds.keys()
    }


def run_way(options: argparse.Namespace) -> dict[str, Any]:
    """Run one way; called in its own process."""
    torch.set_num_threads(1)
    options.on_step = wait_for_turn
    wait_for_turn(0.0)
    run = options.folder / options.way
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "budget": lambda: run_ours(options, run, "off"),
        "packed": lambda: run_ours(options, run, "on"),
        "compiled": lambda: run_ours(options, run, "on", torch_compile=True),
    }
    if options.way in STOCK_WAYS:
        return run_stock(options, STOCK_WAYS[options.way], run)
    return ways[options.way]()


def build_parser(doc: str) -> argparse.ArgumentParser:
    """Build the parser of this benchmark's options, which gpu.py uses too."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="ShareGPT conversations; default: synthetic ones with long-tailed lengths"
    )
    parser.add_argument("--size", choices=list(KNOWN_CONFIGS), default="google/flan-t5-small", help="shape of the base")
    parser.add_argument("--num-layers", type=int, help="layers of encoder and of decoder; default: as --size")
    parser.add_argument("--longest", type=int, default=512, help="maximum tokens of a source and of a target")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=9, help="steps of our ways, with the warm-up")
    parser.add_argument("--warm-up", type=int, default=1, help="steps that aren't timed, at the start of each way")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per batch of our ways")
    parser.add_argument("--batch-size", type=int, default=8, help="examples per batch of the stock ways")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout of the base and of the adapters")
    parser.add_argument("--training-args", type=json.loads, default={}, help="TrainingArguments of our ways, as JSON")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(on_gpu=False, on_step=None, on_end=None, shape={})
    return parser


def main() -> None:
    assert __doc__ is not None
    options = build_parser(__doc__).parse_args()
    print(json.dumps(run_way(options) if options.way else compare(options, CPU_ENVIRONMENT)))


if __name__ == "__main__":
    main()
