"""Check evaluation, generation and serving on a GPU, and what happens when its memory runs out.

For the latter, torch may allocate only a part of the GPU's memory. A CPU has no such limit, so there a lookup of too
many tokens fails instead, with the same error.
"""

import argparse
import gc
import json
import math
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_checks import LEARNING, NUM_WORDS
from gpu_runner import Comparison, make_check
from gpu_training import check_package, forget_peak_memory, make_run_folder, make_settings, set_up
from serve import keep_tokens_with_text, make_prompts
from torch import nn

from t5tune.commands.evaluate import evaluate
from t5tune.commands.serve import Server, serve
from t5tune.commands.train import train
from t5tune.errors import OutOfMemory
from t5tune.inference.generation import Decoding, generate
from t5tune.inference.loading import load_for_inference
from t5tune.model.device import use_gpu_kernels
from t5tune.progress import Note
from t5tune.settings import EvaluateSettings, ServeSettings
from t5tune.settings.groups.base import InferenceSettings

TRAINING_LIMIT = 4 * 10**9  # bytes: enough for FITTING tokens in a batch of Flan-T5-small, but not for TOO_MANY
TOO_MANY, FITTING = 131_072, 4_096
TINY_TOO_MANY, TINY_FITTING = 2_048, 512
# shares of the memory that a batch takes in addition to the weights: the first that is too small is used
SHARES = (0.6, 0.4, 0.25)
BF16_LOSS, SAME_LOSS = 0.001, 0.0005  # relative difference that rounding explains
SAME_REPLIES, SAME_FIRST_WORDS = 0.9, 0.8  # shares, in fp32 and in bf16, whose rounding changes close decisions
NUM_PROMPTS, REPLY_TOKENS = 32, 16
NUM_AT_ONCE = 96  # replies that don't fit in memory at once
NUM_EVALUATED = 64
NUM_BUCKETS = 32  # rows of a position bias, which isn't looked up by tokens


@contextmanager
def limit_memory(on_gpu: bool, size: float, tokens: int) -> Iterator[None]:
    """Let torch allocate at most `size` bytes on the GPU; on a CPU, let lookups of more than `tokens` tokens fail."""
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.get_device_properties(0).total_memory))
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
        return
    look_up = nn.Embedding.forward

    def look_up_few(module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if module.num_embeddings > NUM_BUCKETS and ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return look_up(module, ids)

    nn.Embedding.forward = look_up_few  # type: ignore[method-assign]
    yield
    nn.Embedding.forward = look_up  # type: ignore[method-assign]


def check_memory_in_training(folder: Path, **values: Any) -> dict[str, Any]:
    """Train with a batch that doesn't fit, and then with one that does, in the same process."""
    options = set_up(folder, dropout=0.0, num_words=NUM_WORDS, **values)
    is_tiny = options.tokens <= TINY_FITTING
    too_many, fitting = (TINY_TOO_MANY, TINY_FITTING) if is_tiny else (TOO_MANY, FITTING)
    message = ""
    with limit_memory(options.on_gpu, TRAINING_LIMIT, fitting):
        try:
            train(make_settings(options, make_run_folder(options), "on", tokens_per_batch=too_many))
        except OutOfMemory as error:
            message = str(error)
        forget_peak_memory(options)
        result = train(make_settings(options, make_run_folder(options), "on", tokens_per_batch=fitting))
    return make_check(
        [
            Comparison("error names the batch", f"tokens_per_batch {too_many}" in message, "==", True),
            Comparison("lines of the error", len(message.splitlines()), "==", 1),
            Comparison("steps of a smaller batch", result.steps, "==", options.steps),
            Comparison("its loss is finite", math.isfinite(result.train_loss or math.nan), "==", True),
        ],
        error=message,
    )


def check_evaluation(folder: Path, **values: Any) -> dict[str, Any]:
    """Evaluate in fp32, in bf16, and in bf16 with too little memory for a batch."""
    options = set_up(folder, dropout=0.0, num_words=NUM_WORDS, **values)
    data = options.folder / "evaluated.jsonl"
    lines = options.data.read_text().splitlines()[:NUM_EVALUATED]
    data.write_text("\n".join(lines) + "\n")
    notes = list[str]()

    def run(bf16: bool) -> Any:
        settings = EvaluateSettings(
            model_name_or_path=str(options.folder / "base"), data_path=[str(data)], bf16=bf16, max_new_tokens=8,
            output_dir=options.folder / "evaluation", overwrite=True, use_cpu=not options.on_gpu,
            model_max_length=options.longest,
        )  # fmt: skip
        return evaluate(settings, lambda event: notes.append(event.text) if isinstance(event, Note) else None)

    exact = run(bf16=False)
    forget_peak_memory(options)
    whole = run(bf16=True)
    peak = torch.cuda.max_memory_reserved() if options.on_gpu else 0
    weights = sum(file.stat().st_size for file in (options.folder / "base").glob("*.safetensors"))
    notes.clear()
    limited, used = whole, 0.0
    for share in SHARES:
        with limit_memory(options.on_gpu, weights + share * (peak - weights), int(share * options.tokens)):
            limited, used = run(bf16=True), share
        if any("out of memory" in note for note in notes):
            break
    rounding, halving = abs(whole.loss - exact.loss) / exact.loss, abs(limited.loss - whole.loss) / whole.loss
    return make_check(
        [
            Comparison("examples", limited.examples, "==", len(lines)),
            Comparison("difference of the loss in bf16 and fp32", rounding, "<=", BF16_LOSS),
            Comparison("batches were halved", sum("out of memory" in note for note in notes), ">=", 1),
            Comparison("difference of the loss in smaller batches", halving, "<=", SAME_LOSS),
        ],
        share_of_memory=used,
        notes=notes,
    )


def check_generation(folder: Path, **values: Any) -> dict[str, Any]:
    """Compare greedy replies and beam search with transformers' on the CPU, and try generation in a training run."""
    from transformers import AutoModelForSeq2SeqLM

    options = set_up(folder, dropout=0.0, num_words=NUM_WORDS, **values)
    base = options.folder / "base"
    stock = AutoModelForSeq2SeqLM.from_pretrained(base, dtype=torch.float32).eval()
    torch.manual_seed(0)
    lengths = torch.randint(4, options.longest, (NUM_PROMPTS,)).tolist()
    sources = [torch.randint(100, 1000, (length,)).tolist() for length in lengths]
    expected = {beams: [generate_as_stock(stock, source, beams) for source in sources] for beams in (1, 4)}

    def compute_equal_share(bf16: bool, beams: int, tokens: int) -> float:
        settings = InferenceSettings(model_name_or_path=str(base), bf16=bf16, use_cpu=not options.on_gpu)
        loaded = load_for_inference(settings)
        ids = loaded.tokenizer.eos_token_id, loaded.tokenizer.pad_token_id
        with use_gpu_kernels(loaded.model.device):
            found = generate(loaded.model, sources, Decoding(*ids, REPLY_TOKENS, beams, keeps_stop=True))
        return compute_share([reply[:tokens] for reply in found], [reply[:tokens] for reply in expected[beams]])

    greedy, searched = (compute_equal_share(False, beams, REPLY_TOKENS) for beams in expected)
    comparisons = [
        Comparison("equal greedy replies in fp32", greedy, ">=", SAME_REPLIES),
        Comparison("equal replies of 4 beams in fp32", searched, ">=", SAME_REPLIES),
        Comparison("equal first tokens in bf16", compute_equal_share(True, 1, 1), ">=", SAME_FIRST_WORDS),
    ]
    changes = {"eval_fraction": 0.1, "eval_generate": 4, "eval_strategy": "epoch", "report_samples": 2}
    result = train(make_settings(options, make_run_folder(options), "on", **LEARNING, **changes))
    is_scored = result.eval.get("rougeL") is not None
    comparisons.append(Comparison("replies are scored in a training run", is_scored, "==", True))
    return make_check(comparisons)


def generate_as_stock(model: Any, source: list[int], beams: int) -> list[int]:
    ids = model.generate(
        input_ids=torch.tensor([source]), max_new_tokens=REPLY_TOKENS, num_beams=beams, do_sample=False
    )
    reply: list[int] = ids[0, 1:].tolist()
    return reply


def compute_share(found: list[Any], expected: list[Any]) -> float:
    """Compute the share of equal replies."""
    return sum(one == other for one, other in zip(found, expected, strict=True)) / len(expected)


def make_served(folder: Path, **values: Any) -> tuple[argparse.Namespace, Path, list[Path]]:
    """Make a base that writes text, and two adapters for it."""
    options = set_up(folder / "served", dropout=0.0, num_words=NUM_WORDS, **values)
    base = options.folder / "base"
    # its files are links to a base that other checks use
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content)
    keep_tokens_with_text(base)
    adapters = []
    for seed in (1, 2):
        run = make_run_folder(options)
        train(make_settings(options, run, "on", **{**LEARNING, "learning_rate": 3e-2, "seed": seed}))
        adapters.append(run)
    return options, base, adapters


def start_server(options: argparse.Namespace, models: dict[str, Path], **changes: Any) -> Server:
    values = dict(
        models={name: str(path) for name, path in models.items()}, port=0, conversation_template="plain",
        use_cpu=not options.on_gpu, converted_dir=options.folder / "converted",
    )  # fmt: skip
    return serve(ServeSettings(**{**values, **changes}))


def ask(server: Server, model: str, prompts: list[str]) -> list[str]:
    """Ask for replies to several prompts in one request."""
    body = {"model": model, "prompt": prompts, "max_tokens": REPLY_TOKENS}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return [choice["text"] for choice in json.load(response)["choices"]]


def get_engine(server: Server, model: str) -> Any:
    return server._http._service.models[model].engine


def check_serving(folder: Path, **values: Any) -> dict[str, Any]:
    """Serve two adapters on one base, with both engines."""
    check_package("ctranslate2")
    options, base, adapters = make_served(folder, **values)
    models, prompts = dict(zip(("base", "first", "second"), (base, *adapters), strict=True)), make_prompts(NUM_PROMPTS)
    comparisons, replies = [], dict[str, Any]()
    # on a CPU, CTranslate2 may not have bf16
    for engine, bf16 in (("transformers", False), ("transformers", True), ("ctranslate2", options.on_gpu)):
        with start_server(options, models, engine=engine, bf16=bf16) as server:
            found = replies[f"{engine}, {bf16}"] = {name: ask(server, name, prompts) for name in models}
            if engine == "transformers":
                places = {get_engine(server, name)._model.get_input_embeddings().weight.data_ptr() for name in models}
                comparisons.append(Comparison(f"bases in memory, bf16 {bf16}", len(places), "==", 1))
    exact = replies.pop("transformers, False")
    for one, other in (("base", "first"), ("base", "second"), ("first", "second")):
        share = compute_share(exact[one], exact[other])
        comparisons.append(Comparison(f"equal replies of {one} and {other}", share, "<=", 0.5))
    with start_server(options, {"second": adapters[1]}, engine="transformers", bf16=False) as server:
        share = compute_share(ask(server, "second", prompts), exact["second"])
    comparisons.append(Comparison("equal replies of an adapter alone", share, ">=", SAME_REPLIES))
    for way, found in replies.items():
        for name in models:
            firsts = ([text.split()[:1] for text in texts] for texts in (found[name], exact[name]))
            share = compute_share(*firsts)
            comparisons.append(Comparison(f"equal first words, {way}, {name}", share, ">=", SAME_FIRST_WORDS))
    return make_check(comparisons)


def check_memory_in_serving(folder: Path, **values: Any) -> dict[str, Any]:
    """Ask a server for more replies than fit in memory at once, and for one reply after that."""
    options, base, _ = make_served(folder, **values)
    prompts = make_prompts(NUM_AT_ONCE)
    with start_server(options, {"base": base}, engine="transformers", bf16=False) as server:
        forget_peak_memory(options)
        weights = torch.cuda.memory_reserved() if options.on_gpu else 0
        expected, failures = ask(server, "base", prompts), list[str]()
        peak = torch.cuda.max_memory_reserved() if options.on_gpu else 0
        record_failures(get_engine(server, "base"), failures)
        tokens = NUM_AT_ONCE * max(len(prompt.split()) for prompt in prompts)
        for share in SHARES:
            with limit_memory(options.on_gpu, weights + share * (peak - weights), int(share * tokens)):
                found, after = ask(server, "base", prompts), ask(server, "base", prompts[:1])
            if failures:
                break
    return make_check(
        [
            Comparison("batches that failed", len(failures), ">=", 1),
            Comparison("replies", len(found), "==", NUM_AT_ONCE),
            Comparison("equal replies", compute_share(found, expected), ">=", SAME_REPLIES),
            Comparison("equal reply afterwards", after, "==", expected[:1]),
        ],
        failures=failures,
    )


def record_failures(engine: Any, failures: list[str]) -> None:
    """Record the errors of an engine's batches."""
    generate_batch: Callable[..., None] = engine.generate

    def generate_and_record(generations: Any, on_token: Any) -> None:
        try:
            generate_batch(generations, on_token)
        except Exception as error:
            failures.append(str(error)[:200])
            raise

    engine.generate = generate_and_record
