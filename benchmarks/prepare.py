"""Compare `t5tune prepare` with the tokenizer alone, `datasets.map` and FastChat's preprocessing, on the same file.

    python benchmarks/prepare.py --tokenizer FOLDER --data chats.json [--threads 1] [--runs 3]

Each side runs in its own process; the sides take turns, `runs` times, and the fastest run of each counts. The tokenizer
alone gets the conversations' texts from memory and only encodes; the other sides read, encode and write. FastChat's
preprocessing is reimplemented here from its description: it encodes the whole conversation, then each turn again, one
at a time. Prints one JSON line: wall and CPU seconds, peak memory (MB), and the ratios of wall seconds to the
tokenizer's.

    python benchmarks/prepare.py --tokenizer FOLDER --data chats.jsonl --repeat-to 2000000000 --folder SCRATCH

repeats a file of JSON lines to that many bytes and prepares that, with --threads workers. Prints a JSON line: bytes,
seconds, counts, and the peak memory (MB, VmHWM) of the process, of each worker, and their sum. SCRATCH needs enough
free space for the repeated file and its cache. With `--parts N`, it is prepared again in N parts, in turn; the
last part joins all. Prints seconds and peak memory of each, the speedup that all at once on N machines could
have (by the slowest part), and whether the cache is the same.

    python benchmarks/prepare.py --cache FOLDER

reads examples of a cache at random. Prints a JSON line: examples per CPU second, and bytes per stored token.

`datasets` isn't a dependency of t5tune; install it with `pip install datasets`.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH_SIZE = 256
SIDES = ("tokenizer", "ours", "datasets", "fastchat")


def read_conversations(data: Path) -> Iterator[list[tuple[str, str]]]:
    """Yield the (role, text) turns of every conversation that prepare would accept, with prepare's readers."""
    from t5tune.data.reading.formats import Conversation
    from t5tune.data.reading.raw_records import parse_record
    from t5tune.data.reading.readers import read_records
    from t5tune.settings.groups.record_format import ReadingSettings

    settings = ReadingSettings()
    for record in read_records([data], settings):
        conversation = parse_record(record, settings)
        if isinstance(conversation, Conversation):
            yield [(turn.role, turn.text) for turn in conversation.turns]


def format_turns(turns: list[tuple[str, str]]) -> list[str]:
    """Format turns with FastChat's conversation template, one text per turn."""
    return [f"### {'Human' if role == 'human' else 'Assistant'}: {text}\n" for role, text in turns]


def run_tokenizer_alone(folder: Path, data: Path, output: Path, threads: int) -> tuple[float, float, int]:
    from t5tune.data.tokens.tokenizer import load_tokenizer

    backend = load_tokenizer(folder).backend
    texts = ["".join(format_turns(turns)) for turns in read_conversations(data)]
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = 0
    for start in range(0, len(texts), BATCH_SIZE):
        tokens += sum(len(encoding.ids) for encoding in backend.encode_batch(texts[start : start + BATCH_SIZE]))
    return time.perf_counter() - wall, time.process_time() - cpu, tokens


def run_ours(folder: Path, data: Path, output: Path, threads: int) -> tuple[float, float, int]:
    from t5tune.commands.prepare import prepare
    from t5tune.settings import PrepareSettings

    wall, cpu = time.perf_counter(), time.process_time()
    settings = PrepareSettings(
        model_name_or_path=str(folder),
        data_path=str(data),
        output_dir=output,
        conversation_template="fastchat-t5",
        num_workers=threads,
    )
    result = prepare(settings)
    children = os.times().children_user + os.times().children_system
    size = sum(file.stat().st_size for file in output.glob("*/tokens.bin"))
    return time.perf_counter() - wall, time.process_time() - cpu + children, size and result.examples


def run_datasets_map(folder: Path, data: Path, output: Path, threads: int) -> tuple[float, float, int]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def make_pairs(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Make one row per target: everything before it is the source."""
        sources, targets = [], []
        for turns in batch["turns"]:
            texts = format_turns([(turn["role"], turn["text"]) for turn in turns])
            for index in range(1, len(texts), 2):
                sources.append("".join(texts[:index]))
                targets.append(texts[index])
        encoded = tokenizer(sources, truncation=True, max_length=2048)
        return {"input_ids": encoded["input_ids"], "labels": tokenizer(text_target=targets)["input_ids"]}

    wall, cpu = time.perf_counter(), time.process_time()
    rows = [{"turns": [{"role": role, "text": text} for role, text in turns]} for turns in read_conversations(data)]
    made = datasets.Dataset.from_list(rows).map(
        make_pairs,
        batched=True,
        batch_size=BATCH_SIZE,
        remove_columns=["turns"],
        num_proc=threads if threads > 1 else None,
    )
    made.save_to_disk(output)
    children = os.times().children_user + os.times().children_system
    return time.perf_counter() - wall, time.process_time() - cpu + children, len(made)


def run_fastchat(folder: Path, data: Path, output: Path, threads: int) -> tuple[float, float, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    wall, cpu = time.perf_counter(), time.process_time()
    rows = []
    for turns in read_conversations(data):
        texts = format_turns(turns)
        whole = tokenizer("".join(texts), truncation=True, max_length=2048)["input_ids"]
        lengths = [len(tokenizer(text, truncation=True, max_length=2048)["input_ids"]) - 1 for text in texts]
        start = 0
        for index, length in enumerate(lengths):
            if index % 2:
                rows.append((whole[:start], whole[start : start + length]))
            start += length
    output.write_text(json.dumps(rows))
    return time.perf_counter() - wall, time.process_time() - cpu, len(rows)


RUN = {
    "tokenizer": run_tokenizer_alone,
    "ours": run_ours,
    "datasets": run_datasets_map,
    "fastchat": run_fastchat,
}


def measure_peak_megabytes() -> int:
    """Return the peak memory (MB) of this process, or of its largest child process if that is larger."""
    import resource

    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    own = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return max(own, children) // 1024


def run_repeated(options: argparse.Namespace) -> None:
    """Prepare a file that consists of the data repeated up to a size, and again in parts."""
    data = Path(options.data).read_bytes().rstrip(b"\n") + b"\n"
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        repeated, whole, joined = Path(scratch) / "repeated.jsonl", Path(scratch) / "whole", Path(scratch) / "joined"
        with open(repeated, "wb") as file:
            for _ in range(-(-options.repeat_to // len(data))):
                file.write(data)
        command = [sys.executable, "-m", "t5tune", "prepare", "--model-name-or-path", options.tokenizer]
        command += ["--data-path", str(repeated), "--num-workers", str(options.threads), "--json", "--output-dir"]
        result, memory = measure_prepare([*command, str(whole)])
        counts = {name: result[name] for name in ("conversations", "rejected", "examples")}
        facts = {"bytes": repeated.stat().st_size, "workers": options.threads} | memory | counts
        if options.parts:
            shards = [["--shard", f"{index}/{options.parts}"] for index in range(options.parts)]
            parts = [measure_prepare([*command, str(joined), *shard])[1] for shard in shards]
            facts["parts"] = parts
            facts["speedup"] = round(memory["seconds"] / max(part["seconds"] for part in parts), 2)
            facts["same"] = hash_files(joined) == hash_files(whole)
        print(json.dumps(facts))


def hash_files(folder: Path) -> dict[str, str]:
    """Return the hash of each file of a folder, also in its subfolders, by name."""
    from t5tune.io.atomic import hash_file

    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hash_file(path) for path in files}


def measure_prepare(command: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run `t5tune prepare`; return its result, and its seconds and peak memory (MB)."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        peaks.update(read_peaks(process.pid))
        time.sleep(0.02)
    seconds = round(time.perf_counter() - started, 1)
    if process.returncode:
        sys.exit(f"prepare exited with code {process.returncode}")
    result = json.loads(process.stdout.read()) if process.stdout else {}
    memory = {"peak_mb": [peak >> 10 for peak in peaks.values()], "sum_mb": sum(peaks.values()) >> 10}
    return result, {"seconds": seconds} | memory


def read_at_random(folder: Path) -> None:
    """Measure how fast examples are read from a cache in random order, and how large the cache is."""
    from t5tune.data.caches.prepared import open_examples

    examples = open_examples(folder)
    chosen = random.Random(0).choices(range(len(examples)), k=200_000)
    started = time.process_time()
    for index in chosen:
        examples[index]
    seconds = time.process_time() - started
    cache = examples.main.cache
    sizes = {name: (cache.folder / f"{name}.bin").stat().st_size for name in ("tokens", "conversations", "examples")}
    tokens = sizes["tokens"] // int(cache.manifest["dtype"][-1])
    facts = {"examples": len(examples), "examples_per_second": round(len(chosen) / seconds)}
    print(json.dumps(facts | {"bytes_per_token": round(sum(sizes.values()) / tokens, 3)}))


def read_peaks(pid: int) -> dict[int, int]:
    """Return the peak memory (KiB) so far of a process and its descendants by process id, in the order of start."""
    found: dict[int, int] = {}
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        found[pid] = int(status.split("VmHWM:")[1].split()[0])
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found |= read_peaks(int(child))
    except (OSError, IndexError):  # the process has ended
        pass
    return found


def run_side(side: str, options: argparse.Namespace) -> dict[str, float] | None:
    if side == "datasets" and importlib.util.find_spec("datasets") is None:
        print("skipping datasets, which isn't installed", file=sys.stderr)
        return None
    environment = {**os.environ, "RAYON_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, __file__, "--side", side, "--tokenizer", options.tokenizer, "--data", options.data]
    done = subprocess.run(
        [*command, "--threads", str(options.threads)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", help="folder of a base with its tokenizer and config.json")
    parser.add_argument("--data", help="a file of conversations")
    parser.add_argument("--cache", type=Path, help="only read examples of this cache at random")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument(
        "--repeat-to", type=int, metavar="BYTES", help="only run prepare, on the data repeated to this size"
    )
    parser.add_argument("--parts", type=int, default=0, help="then prepare it again in this many parts")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="temporary folder for the repeated data")
    options = parser.parse_args()
    if options.cache:
        read_at_random(options.cache)
        return
    if not (options.tokenizer and options.data):
        parser.error("expected --tokenizer and --data, or --cache")
    if options.repeat_to:
        run_repeated(options)
        return
    if options.side:
        with tempfile.TemporaryDirectory() as folder:
            wall, cpu, count = RUN[options.side](
                Path(options.tokenizer), Path(options.data), Path(folder) / "out", options.threads
            )
        print(json.dumps({"wall": wall, "cpu": cpu, "peak_mb": measure_peak_megabytes(), "count": count}))
        return
    with tempfile.TemporaryDirectory() as folder:
        # every side gets the tokenizer that prepare saves, with the added tokens, which AutoTokenizer can load
        base = Path(folder) / "base"
        shutil.copytree(options.tokenizer, base)
        _add_tokens(base)
        options.tokenizer = str(base)
        results: dict[str, dict[str, float]] = {}
        for _ in range(options.runs):
            for side in options.sides:
                found = run_side(side, options)
                if found and (side not in results or found["wall"] < results[side]["wall"]):
                    results[side] = found
    ratios = {side: round(found["wall"] / results["tokenizer"]["wall"], 3) for side, found in results.items()}
    print(json.dumps({"threads": options.threads, "ratio_to_tokenizer": ratios, "sides": results}))


def _add_tokens(base: Path) -> None:
    from t5tune.data.tokens.tokenizer import load_tokenizer, save_tokenizer
    from t5tune.data.tokens.vocabulary import extend_tokenizer

    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    tokenizer, *_ = extend_tokenizer(load_tokenizer(base), ["auto"], rows)
    save_tokenizer(tokenizer, base)


if __name__ == "__main__":
    main()
