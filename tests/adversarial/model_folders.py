"""Untrusted bases and adapters: each case breaks one thing in a good base and adapter.

`FOLDERS` maps a case's name to (what breaks it, the error's text). merge refuses each with exit code 2.
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
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "template.yaml"
BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)
Break = Callable[[Path, Path], Any]


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: Path, text: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(of_adapter: bool, change: Callable[[dict[str, Any], int], Any]) -> Break:
    """Call `change` with the header of the weights, and the number of bytes after it."""

    def apply(base: Path, adapter: Path) -> None:
        path = adapter / ADAPTER if of_adapter else base / WEIGHTS
        entries, data = header(path)
        change(entries, len(data))
        with_header(path, json.dumps(entries).encode(), data)

    return apply


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


def in_hub_cache(link: str) -> Break:
    """Make the base a snapshot whose weights are a link. blobs/evil links out of the cache."""

    def apply(base: Path, adapter: Path) -> None:
        snapshot, cache = base / "models--o--n" / "snapshots" / "abc", base / "models--o--n"
        other = base / "models--o--other" / "blobs"
        outside = base.parent / "outside"
        for folder in (snapshot, snapshot.with_name("def"), cache / "blobs", other, outside):
            folder.mkdir(parents=True)
        weights = base / WEIGHTS
        for copy in (other / "w", outside / "w", snapshot.with_name("def") / WEIGHTS):
            copy.write_bytes(weights.read_bytes())
        (cache / "blobs" / "evil").symlink_to(outside / "w")
        weights.unlink()
        weights.symlink_to(Path("models--o--n") / "snapshots" / "abc" / WEIGHTS)
        (snapshot / WEIGHTS).symlink_to(link)
        (snapshot / CONFIG).write_bytes((base / CONFIG).read_bytes())
        # merge is given the snapshot
        kept = base.with_name("kept")
        base.rename(kept)
        base.symlink_to(kept / "models--o--n" / "snapshots" / "abc")

    return apply


def replace_file(of_adapter: bool, name: str, make: Callable[[Path], Any]) -> Break:
    def apply(base: Path, adapter: Path) -> None:
        path = (adapter if of_adapter else base) / name
        path.unlink(missing_ok=True)
        make(path)

    return apply


def link_to(of_adapter: bool, name: str, target: str) -> Break:
    return replace_file(of_adapter, name, lambda path: path.symlink_to(target))


def sparse(of_adapter: bool, name: str, begin: bytes = b"") -> Break:
    """Make a file of a terabyte that takes no space on disk, but would never end when it is read or copied."""
    return replace_file(of_adapter, name, lambda path: (path.write_bytes(begin), os.truncate(path, 1 << 40)))


def shard_cut(base: Path, adapter: Path) -> None:
    indexed("model-1.safetensors")(base, adapter)
    data = (base / "model-1.safetensors").read_bytes()
    (base / "model-1.safetensors").write_bytes(data[:-4])


def shard_of_two(base: Path, adapter: Path) -> None:
    """Put the same tensors into both files of the index."""
    indexed("model-2.safetensors")(base, adapter)
    (base / "model-2.safetensors").write_bytes((base / "model-1.safetensors").read_bytes())


def index_linked_out(base: Path, adapter: Path) -> None:
    indexed("model-1.safetensors")(base, adapter)
    linked_out(False, INDEX)(base, adapter)


def a_terabyte(base: Path, adapter: Path) -> None:
    """Add a tensor that is a hole in a sparse file: the base takes no disk space, but a merged checkpoint would."""
    hole = 1 << 40
    change_header(False, lambda e, size: e.update(x=entry("U8", [hole], size, size + hole)))(base, adapter)
    os.truncate(base / WEIGHTS, (base / WEIGHTS).stat().st_size + hole)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def base_metadata(**changes: Any) -> Break:
    """Change the description of the base in the adapter's file."""
    return change_header(True, lambda e, size: e["__metadata__"].update(t5tune=json.dumps(changes)))


def pattern(key: str) -> Break:
    return change_json(True, rank_pattern={key: 4})


FOLDERS: dict[str, tuple[Break, str]] = {
    "giant header": (lambda b, a: (b / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 40) + b"{}"), WEIGHTS),
    "link out of the base": (linked_out(False, WEIGHTS), WEIGHTS),
    "config linked out": (linked_out(False, CONFIG), CONFIG),
    "link out of the adapter": (linked_out(True, ADAPTER), ADAPTER),
    "index of another kind": (indexed("model-1.bin"), INDEX),
    "a pipe": (replace_file(False, WEIGHTS, os.mkfifo), WEIGHTS),
    "code in the config": (change_json(False, auto_map={"AutoModel": "x--y.Z"}), CONFIG),
    "config key twice": (text_of(False, CONFIG, '{"model_type": "t5", "model_type": "mt5"}'), CONFIG),
    "tokenizer's code": (text_of(False, TOKENIZER_CONFIG, '{"auto_map": {"AutoTokenizer": "x.Y"}}'), TOKENIZER_CONFIG),
    "rank is a string": (change_json(True, r="8"), ADAPTER_CONFIG),
    "rank is true": (change_json(True, r=True), ADAPTER_CONFIG),
    "alpha is a list": (change_json(True, lora_alpha=[1]), ADAPTER_CONFIG),
    "pattern that takes forever": (change_json(True, alpha_pattern={"(a+)+b": 2}), ADAPTER_CONFIG),
    "rows are strings": (change_json(True, trainable_token_indices={"shared": ["1"]}), ADAPTER_CONFIG),
    "modules are numbers": (change_json(True, modules_to_save=[1]), ADAPTER_CONFIG),
    "adapter of integers": (
        change_header(True, lambda e, size: [e[name].update(dtype="I32") for name in e if name != "__metadata__"]),
        "I32",
    ),
    # links
    "blob that links out of the cache": (in_hub_cache("../../blobs/evil"), WEIGHTS),
    "blob of another model": (in_hub_cache("../../../models--o--other/blobs/w"), WEIGHTS),
    "file of another revision": (in_hub_cache("../def/model.safetensors"), WEIGHTS),
    "blob that doesn't exist": (in_hub_cache("../../blobs/none"), WEIGHTS),
    "link to itself": (link_to(False, CONFIG, CONFIG), CONFIG),
    "index linked out": (index_linked_out, INDEX),
    "tokenizer linked out": (link_to(True, TOKENIZER_CONFIG, "/etc/hostname"), TOKENIZER_CONFIG),
    "base's tokenizer linked out": (link_to(False, TOKENIZER, "/etc/hostname"), TOKENIZER),
    "template linked out": (link_to(True, TEMPLATE, "/etc/hostname"), TEMPLATE),
    "base's template linked out": (link_to(False, TEMPLATE, "/etc/hostname"), TEMPLATE),
    "generation config linked out": (link_to(False, "generation_config.json", "/etc/hostname"), "generation_config"),
    "link to a device": (link_to(True, ADAPTER, "/dev/zero"), ADAPTER),
    # not regular files
    "pipe for the config": (replace_file(False, CONFIG, os.mkfifo), CONFIG),
    "pipe for the adapter's config": (replace_file(True, ADAPTER_CONFIG, os.mkfifo), ADAPTER_CONFIG),
    "pipe for the adapter": (replace_file(True, ADAPTER, os.mkfifo), ADAPTER),
    "pipe for the tokenizer": (replace_file(False, TOKENIZER, os.mkfifo), TOKENIZER),
    "pipe for the template": (replace_file(True, TEMPLATE, os.mkfifo), TEMPLATE),
    "folder for the weights": (replace_file(False, WEIGHTS, Path.mkdir), WEIGHTS),
    "folder for the config": (replace_file(False, CONFIG, Path.mkdir), CONFIG),
    # sizes
    "tokenizer of a terabyte": (sparse(False, TOKENIZER, b'{"added_tokens": []'), TOKENIZER),
    "template of a terabyte": (sparse(True, TEMPLATE), TEMPLATE),
    "generation config of a terabyte": (sparse(False, "generation_config.json"), "generation_config.json"),
    "config of a terabyte": (sparse(False, CONFIG), CONFIG),
    "weights of a terabyte": (a_terabyte, "output_dir: "),
    # indexes
    "index in upper case": (indexed("MODEL-1.safetensors"), "MODEL-1.safetensors"),
    "index with a zero byte": (indexed("model-1.safetensors\0.safetensors"), "model-1"),
    "index with a right-to-left override": (indexed("\u202emodel-1.safetensors"), "model-1"),
    "index with a lone surrogate": (indexed("\ud800.safetensors"), ".safetensors"),
    "index with an endless name": (indexed("x" * 5000 + ".safetensors"), "xxx"),
    "shard that ends early": (shard_cut, "model-1.safetensors"),
    "tensors in two shards": (shard_of_two, "model-2.safetensors"),
    # headers
    "ten thousand tensors": (
        change_header(True, lambda e, size: e.update({f"x{i}": entry("F32", [0], size, size) for i in range(10_000)})),
        ADAPTER,
    ),
    # adapters
    "expression that takes forever": (pattern(".?" * 90 + "x"), ADAPTER_CONFIG),
    "alternatives that take forever": (pattern("(.|.)" * 35 + "x"), ADAPTER_CONFIG),
    "stars that take forever": (pattern(".*" * 4 + "x"), ADAPTER_CONFIG),
    "expression with a backreference": (pattern(r"(.*)\1\1x"), ADAPTER_CONFIG),
    "expression with a set in a set": (pattern("[[q]"), ADAPTER_CONFIG),
    "ten thousand patterns": (change_json(True, rank_pattern={f"x{i}.*y": 4 for i in range(10_000)}), ADAPTER_CONFIG),
    "module without a name": (change_json(True, modules_to_save=[""]), ADAPTER_CONFIG),
    "code as base": (
        change_json(True, base_model_name_or_path='x")\nimport os; os.system("true")  #'),
        ADAPTER_CONFIG,
    ),
    "target with a line of code": (change_json(True, target_modules=["q", "v\n```\nrm -rf ~"]), ADAPTER_CONFIG),
    "alpha of 10^400": (text_of(True, ADAPTER_CONFIG, '{"peft_type": "LORA", "r": 4, "lora_alpha": 1e400}'), "alpha"),
    "code in megatron_config": (change_json(True, megatron_core="evil", megatron_config={"a": 1}), ADAPTER_CONFIG),
    "targets that take forever": (change_json(True, target_modules=".?" * 90 + "x"), ADAPTER_CONFIG),
    "row of a negative token id": (change_json(True, trainable_token_indices=[-1]), ""),
    "fingerprint is a list": (base_metadata(fingerprint=[1]), ADAPTER),
    "trained with an unknown quantization": (base_metadata(onto="nf5"), ADAPTER),
    # configs
    "code deep in the config": (change_json(False, decoder={"auto_map": {"AutoModel": "x--y.Z"}}), CONFIG),
    "attention kernel from the Hub": (change_json(False, attn_implementation="evil/kernel"), CONFIG),
    "kernel of the encoder": (change_json(False, encoder={"_attn_implementation": {"": "evil/kernel"}}), CONFIG),
    "endless config": (text_of(False, CONFIG, '{"a":' * 100_000), CONFIG),
    "generation config is a list": (text_of(False, "generation_config.json", "[1]"), "generation_config.json"),
    # conversation templates
    "template that grows exponentially": (text_of(True, TEMPLATE, BOMB), TEMPLATE),
    "template that runs code": (text_of(True, TEMPLATE, "system: !!python/object/apply:os.system [true]\n"), TEMPLATE),
    "template of random bytes": (lambda b, a: (a / TEMPLATE).write_bytes(b"\xff\xfe\x00" * 99), TEMPLATE),
}
