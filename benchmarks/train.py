"""How fast does training go? Stock Trainer and PEFT as FastChat runs them, beside budget batches and packed rows.

    python benchmarks/train.py                                   # long-tailed lengths up to 512 tokens, in fp32
    python benchmarks/train.py --longest 2048 --dtype bfloat16
    python benchmarks/train.py --data sharegpt.json

Trains LoRA on a random T5 of Flan-T5-small's shape by each way in a process of its own, on the same examples, with one
thread and the same malloc settings, and prints one JSON line. Time is the process's CPU time, so that others on the
machine don't count; a token is useful if it is no padding. `of_peak` is the share of a large matrix product's speed,
counting what the useful tokens need with frozen weights: forward, and the gradients of activations.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_TOP_PAD_": "268435456"}
WAYS = ("stock", "stock sdpa", "budget", "packed")
POCKET = Path(__file__).parents[1] / "t5tune" / "pocket"


def write_base(folder: Path, num_layers: int, dropout: float) -> None:
    """A random untied T5 of Flan-T5-small's width with the built-in tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_heads=6, num_layers=num_layers,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, dropout_rate=dropout,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight.data.mul_(512**-0.5)  # else probabilities are denormal numbers, which no trained model has
    model.save_pretrained(folder)
    for file in POCKET.glob("tokenizer*"):
        shutil.copy(file, folder)


def write_conversations(path: Path, count: int, longest: int) -> None:
    """Pairs of lengths like ShareGPT's: log-normal, median 350 tokens of source and 150 of target."""
    vocabulary = json.loads((POCKET / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = vocabulary if isinstance(vocabulary, dict) else [piece for piece, _ in vocabulary]
    words = [piece[1:] for piece in pieces if piece[0] == "▁" and piece[1:].isalpha()]
    rng = np.random.default_rng(0)
    sources = np.clip(rng.lognormal(math.log(350), 1.1, count), 8, longest).astype(int)
    targets = np.clip(rng.lognormal(math.log(150), 1.0, count), 4, longest).astype(int)
    with open(path, "w") as file:
        for source, target in zip(sources, targets, strict=True):
            turns = [("human", rng.choice(words, source)), ("gpt", rng.choice(words, target))]
            record = {"conversations": [{"from": who, "value": " ".join(text)} for who, text in turns]}
            file.write(json.dumps(record) + "\n")


class Clock:
    """CPU seconds of the steps behind the first, which warms up."""

    def __init__(self) -> None:
        self.begun: float | None = None
        self.seconds = 0.0

    def tick(self) -> None:
        now = time.process_time()
        self.begun = self.begun or now
        self.seconds = now - self.begun


def ours(options: argparse.Namespace, packing: str, folder: Path) -> dict[str, Any]:
    from t5tune.data.cache import open_cache
    from t5tune.progress import Advanced, Event
    from t5tune.settings import TrainSettings
    from t5tune.train import train
    from t5tune.training.batches import BudgetSampler

    clock = Clock()

    def report(event: Event) -> None:
        if isinstance(event, Advanced) and event.task == "train" and event.done:
            clock.tick()

    settings = TrainSettings(
        model_name_or_path=str(options.folder / "base"), data_path=str(options.folder / "cache"), output_dir=folder,
        tokens_per_batch=options.tokens, packing=packing, max_steps=options.steps, use_cpu=True,
        bf16=options.dtype == "bfloat16", save_strategy="no", train_token_rows=False, lora_dropout=options.dropout,
    )  # fmt: skip
    train(settings, report)
    sources, targets = open_cache(options.folder / "cache").lengths()
    sampler = BudgetSampler(sources, targets, options.tokens, packing == "on", 1, settings.seed)
    batches = list(sampler)[: options.steps]
    return measured(clock, sources, targets, batches, packing == "on", options)


def stock(options: argparse.Namespace, attention: str, folder: Path) -> dict[str, Any]:
    """FastChat's way: random batches of a number of examples, padded to their longest; HF's own loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSeq2SeqLM, Trainer, TrainerCallback, TrainingArguments

    from t5tune.data.cache import open_cache

    cache = open_cache(options.folder / "cache")
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    model = AutoModelForSeq2SeqLM.from_pretrained(options.folder / "base", dtype=dtype, attn_implementation=attention)
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=options.dropout, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"
    )
    model = get_peft_model(model, lora)
    clock, seen = Clock(), []

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    def collate(indices: list[int]) -> dict[str, torch.Tensor]:
        seen.append(indices)
        pad = torch.nn.utils.rnn.pad_sequence
        sources = [torch.from_numpy(cache[i].source_S.astype(np.int64)) for i in indices]
        targets = [torch.from_numpy(cache[i].target_T.astype(np.int64)) for i in indices]
        ids = pad(sources, batch_first=True)
        return {"input_ids": ids, "attention_mask": ids.ne(0), "labels": pad(targets, True, -100)}

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=options.batch_size, max_steps=options.steps, use_cpu=True,
        bf16=options.dtype == "bfloat16", save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1000,
        remove_unused_columns=False, log_level="error",
    )  # fmt: skip
    indices: Any = list(range(len(cache)))
    Trainer(model=model, args=arguments, train_dataset=indices, data_collator=collate, callbacks=[Ticks()]).train()
    sources, targets = cache.lengths()
    return measured(clock, sources, targets, seen[: options.steps], False, options)


def measured(
    clock: Clock, sources: Any, targets: Any, batches: list[Any], packed: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Useful tokens per second, the share of the peak that they take, and the share of padding."""
    lengths = [(sources[batch], targets[batch]) for batch in batches[1:]]
    useful = sum(int(source.sum() + target.sum()) for source, target in lengths)
    computed = useful
    if not packed:
        computed = sum(len(source) * int(source.max() + target.max()) for source, target in lengths)
    operations = sum(needed(source, target, options.num_layers) for source, target in lengths)
    peak = matrix_peak(torch.bfloat16 if options.dtype == "bfloat16" else torch.float32)
    return {
        "useful_tokens": useful,
        "useful_share": round(useful / computed, 3),
        "cpu_seconds": round(clock.seconds, 1),
        "tokens_per_second": round(useful / clock.seconds, 1),
        "of_peak": round(operations / clock.seconds / peak, 3),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def needed(sources: Any, targets: Any, num_layers: int) -> float:
    """Floating-point operations of a step with frozen weights: 4 a weight and token, 12 a width and pair of tokens."""
    width, inner, hidden = 512, 384, 1024
    projection, feed_forward = width * inner, 3 * width * hidden
    source_weights = num_layers * (4 * projection + feed_forward + 2 * projection)  # keys and values for the decoder
    target_weights = num_layers * (6 * projection + feed_forward) + width * 32128
    pairs = (sources**2 + targets**2 / 2 + sources * targets).sum() * num_layers
    return float(4 * (source_weights * sources.sum() + target_weights * targets.sum()) + 12 * inner * pairs)


def matrix_peak(dtype: torch.dtype) -> float:
    """Operations per CPU second of a large matrix product."""
    a = torch.randn(2048, 2048).to(dtype)
    a @ a
    begun = time.process_time()
    for _ in range(5):
        a @ a
    return 5 * 2 * 2048**3 / (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="ShareGPT conversations; default: made up, of long-tailed lengths")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a source and of a target")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch of ours")
    parser.add_argument("--batch-size", type=int, default=8, help="examples of a stock batch")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the base and on the adapters' input")
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        torch.set_num_threads(1)
        run = options.folder / options.way
        done = {
            "stock": lambda: stock(options, "eager", run),
            "stock sdpa": lambda: stock(options, "sdpa", run),
            "budget": lambda: ours(options, "off", run),
            "packed": lambda: ours(options, "on", run),
        }[options.way]()
        print(json.dumps(done))
        return
    results: dict[str, Any] = {
        name: getattr(options, name) for name in ("longest", "dtype", "dropout", "steps", "tokens")
    }
    results |= {"batch_size": options.batch_size, "data": str(options.data or "synthetic")}
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="t5tune-bench-") as name:
        folder = Path(name)
        write_base(folder / "base", options.num_layers, options.dropout)
        data = options.data
        if data is None:
            data = folder / "made_up.jsonl"
            write_conversations(data, 2000, options.longest)
        prepare = ["-m", "t5tune", "prepare", "--model-name-or-path", folder / "base", "--data-path", data]
        prepare += ["--output-dir", folder / "cache", "--model-max-length", options.longest, "--quiet"]
        subprocess.run([sys.executable, *map(str, prepare)], check=True, stdout=subprocess.DEVNULL)
        for way in options.ways:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--folder", name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            results[way] = json.loads(done.stdout.splitlines()[-1])
            print(way, results[way], file=sys.stderr)
    if {"stock", "packed"} <= results.keys():
        speed = {way: results[way]["tokens_per_second"] for way in options.ways}
        results["packed_over_stock"] = round(speed["packed"] / speed["stock"], 2)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
