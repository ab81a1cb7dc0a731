"""A folder of data in all formats, with duplicates, rejected records, blank lines and all line ends."""

import csv
import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_RECORD_BYTES = 3000  # some records are longer
WORDS = ["lamp", "table", "é", "猫", "{", "}", "\n", "one", "  ", "two"]


def write_corpus(folder: Path, seed: int = 1) -> Path:
    """Write the files, about 500 small records."""
    rng = random.Random(seed)
    folder.mkdir()
    pool = [_make_record(number, rng) for number in range(120)]
    lines = {
        end: end.join(_make_lines(_choose_records(pool, number, rng), rng))
        for end, number in (("\n", 80), ("\r\n", 50), ("\r", 50))
    }
    mark = "\ufeff"
    (folder / "a.jsonl").write_bytes((mark + lines["\n"] + "\n\n" + mark + json.dumps(pool[0])).encode())
    (folder / "b-crlf.jsonl").write_bytes(("\r\n" + lines["\r\n"] + "\r\n").encode())
    (folder / "c-mac.jsonl").write_bytes(("\r\r" + lines["\r"]).encode())
    (folder / "d-array.json").write_text(json.dumps(_choose_records(pool, 50, rng), indent=1))
    keyed = {f"key {number}": record for number, record in enumerate(_choose_records(pool, 50, rng))}
    (folder / "e-object.json").write_text(json.dumps(keyed))
    values = "\n".join(json.dumps(record, indent=2) for record in _choose_records(pool, 30, rng))
    (folder / "f-values.jsonl").write_text(values)
    (folder / "g.jsonl.gz").write_bytes(gzip.compress(lines["\n"][:9000].encode()))
    (folder / "h.jsonl.zst").write_bytes(zstd.compress(lines["\r\n"][-9000:].encode()))
    pairs = [(f"q {rng.randint(0, 20)}\n\ttwo", f"a {rng.randint(0, 1)}") for _ in range(60)]
    with open(folder / "i.csv", "w", newline="") as file:
        csv.writer(file).writerows([("source", "target"), *pairs[:20], ("too", "many", "cells"), *pairs[20:]])
    table = pyarrow.table({"source": [pair[0] for pair in pairs], "target": [pair[1] for pair in pairs]})
    parquet.write_table(table, folder / "j.parquet")
    (folder / "k-blank.jsonl").write_text("\n \n")
    (folder / "l-one-line.jsonl").write_text(json.dumps(pool[1]))
    return folder


def _make_record(number: int, rng: random.Random) -> dict[str, Any]:
    question, answer = (" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2))
    turns = [f"{number} {question}", answer if rng.random() > 0.05 else "", "And?", f"{answer} {number}"]
    record: dict[str, Any] = {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]
    }
    if rng.random() < 0.2:
        record["id"] = record["tags"] = [number]
    if rng.random() < 0.1:
        record["conversations"].append({"from": "human", "value": "no answer follows"})
    return record


def _choose_records(pool: list[dict[str, Any]], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Choose records, of which many are duplicates and some are rejected."""
    bad = [{"text": 1}, {**pool[2], "label": False}, {"conversations": []}]
    return [rng.choice(bad if rng.random() < 0.1 else pool) for _ in range(count)]


def _make_lines(records: list[dict[str, Any]], rng: random.Random) -> list[str]:
    lines: list[str] = []
    for record in records:
        lines.append(json.dumps(record, ensure_ascii=rng.random() < 0.5))
        chance = rng.random()
        if chance < 0.15:
            long = json.dumps({"source": "long " * 1000, "target": "x"})
            lines.append(rng.choice(["", "  ", "{broken", long]))
    return lines
