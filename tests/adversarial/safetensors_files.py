"""Untrusted bases and adapters: each case breaks one thing in a good folder.

`CASES` maps a case's name to (what breaks it, the file that the error must name). merge refuses each with exit code 2.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
Break = Callable[[Path, Path], Any]


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, text: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(change: Callable[[dict[str, Any], str], Any], trailing: bytes = b"") -> Break:
    def apply(base: Path, adapter: Path) -> None:
        entries, data = header(base / WEIGHTS)
        change(entries, next(name for name in entries if name.endswith("q.weight")))
        with_header(base / WEIGHTS, json.dumps(entries).encode(), data + trailing)

    return apply


def double_key(base: Path, adapter: Path) -> None:
    entries, data = header(base / WEIGHTS)
    text = json.dumps(entries)
    name = json.dumps(next(name for name in entries if name.endswith("q.weight")))
    with_header(base / WEIGHTS, f"{text[:-1]}, {name}: {json.dumps(entries[json.loads(name)])}}}".encode(), data)


def change_json(of_adapter: bool, **changes: Any) -> Break:
    def apply(base: Path, adapter: Path) -> None:
        path = adapter / ADAPTER_CONFIG if of_adapter else base / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def text_of(of_adapter: bool, name: str, text: str) -> Break:
    return lambda base, adapter: ((adapter if of_adapter else base) / name).write_text(text)


def linked_out(of_adapter: bool, name: str) -> Break:
    def apply(base: Path, adapter: Path) -> None:
        folder = adapter if of_adapter else base
        elsewhere = base.parent / "elsewhere"
        elsewhere.mkdir()
        (folder / name).rename(elsewhere / name)
        (folder / name).symlink_to(elsewhere / name)

    return apply


def indexed(file: str) -> Break:
    def apply(base: Path, adapter: Path) -> None:
        names = header(base / WEIGHTS)[0].keys() - {"__metadata__"}
        (base / WEIGHTS).rename(base / "model-1.safetensors")
        (base.parent / "model-1.safetensors").write_bytes((base / "model-1.safetensors").read_bytes())
        weight_map = dict.fromkeys(names, "model-1.safetensors") | {"shared.weight": file}
        (base / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return apply


def a_pipe(base: Path, adapter: Path) -> None:
    (base / WEIGHTS).unlink()
    os.mkfifo(base / WEIGHTS)


def of_another_kind(base: Path, adapter: Path) -> None:
    (base / WEIGHTS).rename(base / "tf_model.h5")


def mistyped(tensor_dtype: str) -> Break:
    def apply(base: Path, adapter: Path) -> None:
        entries, data = header(adapter / ADAPTER)
        for entry in entries.values():
            if "dtype" in entry:
                entry["dtype"] = tensor_dtype
        with_header(adapter / ADAPTER, json.dumps(entries).encode(), data)

    return apply


CASES: dict[str, tuple[Break, str]] = {
    "giant header": (lambda b, a: (b / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 40) + b"{}"), WEIGHTS),
    "header of 32 MiB": (lambda b, a: with_header(b / WEIGHTS, b"{" + b" " * (32 << 20) + b"}", b""), WEIGHTS),
    "nested header": (lambda b, a: with_header(b / WEIGHTS, b"[" * 100_000, b""), WEIGHTS),
    "key twice": (double_key, WEIGHTS),
    "bytes after the end": (change_header(lambda e, n: None, b"\0"), WEIGHTS),
    "overlap": (
        change_header(lambda e, n: e[n].update(data_offsets=[0, e[n]["data_offsets"][1] - e[n]["data_offsets"][0]])),
        WEIGHTS,
    ),
    "gap": (change_header(lambda e, n: e.pop(n)), WEIGHTS),
    "shape too large": (change_header(lambda e, n: e[n].update(shape=[1 << 40, 1 << 40])), WEIGHTS),
    "shape of booleans": (change_header(lambda e, n: e[n].update(shape=[True, True])), WEIGHTS),
    "negative offset": (change_header(lambda e, n: e[n].update(data_offsets=[-4, 0])), WEIGHTS),
    "unknown dtype": (change_header(lambda e, n: e[n].update(dtype="F8_E9")), WEIGHTS),
    "metadata of numbers": (change_header(lambda e, n: e.update(__metadata__={"a": 1})), WEIGHTS),
    "link out of the base": (linked_out(False, WEIGHTS), WEIGHTS),
    "config linked out": (linked_out(False, CONFIG), CONFIG),
    "link out of the adapter": (linked_out(True, ADAPTER), ADAPTER),
    "index that leads to the parent folder": (indexed("../model-1.safetensors"), INDEX),
    "index with an absolute path": (indexed("/etc/hostname"), INDEX),
    "index of another kind": (indexed("model-1.bin"), INDEX),
    "index of a missing shard": (indexed("model-2.safetensors"), "model-2.safetensors"),
    "a pipe": (a_pipe, WEIGHTS),
    "an unsupported format": (of_another_kind, "tf_model.h5"),
    "code in the config": (change_json(False, auto_map={"AutoModel": "x--y.Z"}), CONFIG),
    "config key twice": (text_of(False, CONFIG, '{"model_type": "t5", "model_type": "mt5"}'), CONFIG),
    "code in the tokenizer": (
        text_of(False, "tokenizer_config.json", '{"auto_map": {"AutoTokenizer": "x.Y"}}'),
        "tokenizer_config.json",
    ),
    "rank is a string": (change_json(True, r="8"), ADAPTER_CONFIG),
    "rank is true": (change_json(True, r=True), ADAPTER_CONFIG),
    "alpha is a list": (change_json(True, lora_alpha=[1]), ADAPTER_CONFIG),
    "pattern that takes forever": (change_json(True, alpha_pattern={"(a+)+b": 2}), ADAPTER_CONFIG),
    "rows are strings": (change_json(True, trainable_token_indices={"shared": ["1"]}), ADAPTER_CONFIG),
    "modules are numbers": (change_json(True, modules_to_save=[1]), ADAPTER_CONFIG),
    "adapter of integers": (mistyped("I32"), "I32"),
    "adapter config key twice": (
        text_of(True, ADAPTER_CONFIG, '{"peft_type": "LORA", "r": 4, "r": 8}'),
        ADAPTER_CONFIG,
    ),
}
