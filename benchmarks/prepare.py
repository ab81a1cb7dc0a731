"""prepare against the tokenizer alone, `datasets.map`, and FastChat's way, on the same file, one after the other.

    python benchmarks/prepare.py --tokenizer FOLDER --data chats.json [--threads 1] [--runs 3]

Each side runs in a process of its own, the sides in turn, `runs` times over; of each the fastest run counts. The
tokenizer alone gets the conversations' texts from memory and only encodes; the others read, encode and write.
FastChat's way is written here from its description: the whole conversation, then each turn of it once more, one at a
time. Prints one JSON line: wall and CPU seconds, peak memory (MB), and the ratios of wall seconds to the tokenizer's.

    python benchmarks/prepare.py --tokenizer FOLDER --data chats.jsonl --repeat-to 2000000000 --folder SCRATCH

repeats a file of JSON lines to that many bytes and prepares that, with --threads workers. Prints a JSON line: bytes,
seconds, counts, and the peak memory (MB, VmHWM) of the process, of each worker, and their sum. SCRATCH needs the room.

    python benchmarks/prepare.py --cache FOLDER

reads examples of a cache at random. Prints a JSON line: examples a CPU second, and the cache's bytes a stored token.

`datasets` is no dependency of t5tune: pip install datasets.
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

BATCH = 256
SIDES = ("tokenizer", "ours", "datasets", "fastchat")


def conversations(data: Path) -> Iterator[list[tuple[str, str]]]:
    """(role, text) of every conversation that prepare would take, by its own readers."""
    from t5tune.data.formats import Conversation
    from t5tune.data.pipeline import read_record
    from t5tune.data.readers import read_records
    from t5tune.settings.data import ReadingSettings

    settings = ReadingSettings()
    for record in read_records([data], settings.max_record_bytes):
        conversation = read_record(record, settings)
        if isinstance(conversation, Conversation):
            yield [(turn.role, turn.text) for turn in conversation.turns]


def lay_out(turns: list[tuple[str, str]]) -> list[str]:
    """FastChat's layout, a text a turn."""
    return [f"### {'Human' if role == 'human' else 'Assistant'}: {text}\n" for role, text in turns]


def tokenizer_alone(folder: Path, data: Path, output: Path, threads: int) -> tuple[float, float, int]:
    from t5tune.data.tokenizer import load_tokenizer

    backend = load_tokenizer(folder).backend
    texts = ["".join(lay_out(turns)) for turns in conversations(data)]
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = 0
    for start in range(0, len(texts), BATCH):
        tokens += sum(len(encoding.ids) for encoding in backend.encode_batch(texts[start : start + BATCH]))
    return time.perf_counter() - wall, time.process_time() - cpu, tokens


def ours(folder: Path, data: Path, output: Path, threads: int) -> tuple[float, float, int]:
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
    size = (output / "tokens.bin").stat().st_size
    return time.perf_counter() - wall, time.process_time() - cpu + children, size and result.examples


def datasets_map(folder: Path, data: Path, output: Path, threads: int) -> tuple[float, float, int]:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def pairs(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """One row an answer: everything before it, and it."""
        sources, targets = [], []
        for turns in batch["turns"]:
            texts = lay_out([(turn["role"], turn["text"]) for turn in turns])
            for index in range(1, len(texts), 2):
                sources.append("".join(texts[:index]))
                targets.append(texts[index])
        encoded = tokenizer(sources, truncation=True, max_length=2048)
        return {"input_ids": encoded["input_ids"], "labels": tokenizer(text_target=targets)["input_ids"]}

    wall, cpu = time.perf_counter(), time.process_time()
    rows = [{"turns": [{"role": role, "text": text} for role, text in turns]} for turns in conversations(data)]
    made = datasets.Dataset.from_list(rows).map(
        pairs, batched=True, batch_size=BATCH, remove_columns=["turns"], num_proc=threads if threads > 1 else None
    )
    made.save_to_disk(output)
    children = os.times().children_user + os.times().children_system
    return time.perf_counter() - wall, time.process_time() - cpu + children, len(made)


def fastchat(folder: Path, data: Path, output: Path, threads: int) -> tuple[float, float, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    wall, cpu = time.perf_counter(), time.process_time()
    rows = []
    for turns in conversations(data):
        texts = lay_out(turns)
        whole = tokenizer("".join(texts), truncation=True, max_length=2048)["input_ids"]
        lengths = [len(tokenizer(text, truncation=True, max_length=2048)["input_ids"]) - 1 for text in texts]
        start = 0
        for index, length in enumerate(lengths):
            if index % 2:
                rows.append((whole[:start], whole[start : start + length]))
            start += length
    output.write_text(json.dumps(rows))
    return time.perf_counter() - wall, time.process_time() - cpu, len(rows)


RUN = {"tokenizer": tokenizer_alone, "ours": ours, "datasets": datasets_map, "fastchat": fastchat}


def peak_megabytes() -> int:
    """Of this process; of a larger one that it started, of that."""
    import resource

    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    own = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return max(own, children) // 1024


def run_repeated(options: argparse.Namespace) -> None:
    """Prepare a file that is repeated to a size."""
    data = Path(options.data).read_bytes().rstrip(b"\n") + b"\n"
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        repeated = Path(scratch) / "repeated.jsonl"
        with open(repeated, "wb") as file:
            for _ in range(-(-options.repeat_to // len(data))):
                file.write(data)
        command = [sys.executable, "-m", "t5tune", "prepare", "--model-name-or-path", options.tokenizer]
        command += ["--data-path", str(repeated), "--output-dir", str(Path(scratch) / "cache"), "--json"]
        command += ["--num-workers", str(options.threads)]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        peaks: dict[int, int] = {}
        while process.poll() is None:
            peaks.update(peaks_of(process.pid))
            time.sleep(0.02)
        seconds = round(time.perf_counter() - started, 1)
        if process.returncode:
            sys.exit(f"prepare ended with {process.returncode}")
        result = json.loads(process.stdout.read()) if process.stdout else {}
        facts = {"bytes": repeated.stat().st_size, "workers": options.threads, "seconds": seconds}
        counts = {name: result[name] for name in ("conversations", "rejected", "examples")}
        memory = {"peak_mb": [peak >> 10 for peak in peaks.values()], "sum_mb": sum(peaks.values()) >> 10}
        print(json.dumps(facts | counts | memory))


def read_at_random(folder: Path) -> None:
    """How fast a cache gives its examples, and how large it is."""
    from t5tune.data.cache import open_cache

    cache = open_cache(folder)
    chosen = random.Random(0).choices(range(len(cache)), k=200_000)
    started = time.process_time()
    for index in chosen:
        cache[index]
    seconds = time.process_time() - started
    sizes = {name: (folder / f"{name}.bin").stat().st_size for name in ("tokens", "conversations", "examples")}
    tokens = sizes["tokens"] // int(cache.manifest["dtype"][-1])
    facts = {"examples": len(cache), "examples_per_second": round(len(chosen) / seconds)}
    print(json.dumps(facts | {"bytes_per_token": round(sum(sizes.values()) / tokens, 3)}))


def peaks_of(pid: int) -> dict[int, int]:
    """The peak memory (KiB) so far of a process and of those that it started, those first that began first."""
    found: dict[int, int] = {}
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        found[pid] = int(status.split("VmHWM:")[1].split()[0])
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found |= peaks_of(int(child))
    except (OSError, IndexError):  # it has ended
        pass
    return found


def run_side(side: str, options: argparse.Namespace) -> dict[str, float] | None:
    if side == "datasets" and importlib.util.find_spec("datasets") is None:
        print("datasets is not installed: left out", file=sys.stderr)
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
    parser.add_argument("--tokenizer", help="folder of a base: its tokenizer and its config.json")
    parser.add_argument("--data", help="a file of conversations")
    parser.add_argument("--cache", type=Path, help="read this cache at random, and nothing else")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--repeat-to", type=int, metavar="BYTES", help="prepare alone, of the data repeated")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the repeated data lies meanwhile")
    options = parser.parse_args()
    if options.cache:
        read_at_random(options.cache)
        return
    if not (options.tokenizer and options.data):
        parser.error("--tokenizer and --data, or --cache")
    if options.repeat_to:
        run_repeated(options)
        return
    if options.side:
        with tempfile.TemporaryDirectory() as folder:
            wall, cpu, count = RUN[options.side](
                Path(options.tokenizer), Path(options.data), Path(folder) / "out", options.threads
            )
        print(json.dumps({"wall": wall, "cpu": cpu, "peak_mb": peak_megabytes(), "count": count}))
        return
    with tempfile.TemporaryDirectory() as folder:
        # every side gets the tokenizer that prepare makes of it: with the added tokens, as AutoTokenizer loads it
        base = Path(folder) / "base"
        shutil.copytree(options.tokenizer, base)
        _extend(base)
        options.tokenizer = str(base)
        results: dict[str, dict[str, float]] = {}
        for _ in range(options.runs):
            for side in options.sides:
                found = run_side(side, options)
                if found and (side not in results or found["wall"] < results[side]["wall"]):
                    results[side] = found
    ratios = {side: round(found["wall"] / results["tokenizer"]["wall"], 3) for side, found in results.items()}
    print(json.dumps({"threads": options.threads, "ratio_to_tokenizer": ratios, "sides": results}))


def _extend(base: Path) -> None:
    from t5tune.data.tokenizer import load_tokenizer, save_tokenizer
    from t5tune.data.vocabulary import extend_tokenizer

    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    tokenizer, *_ = extend_tokenizer(load_tokenizer(base), ["auto"], rows)
    save_tokenizer(tokenizer, base)


if __name__ == "__main__":
    main()
