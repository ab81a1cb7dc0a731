"""More bases and adapters that a stranger could make: links, names, headers, configs, and what lies beside the weights.

`FOLDERS` is made as `safetensors_files.CASES`: case -> (what breaks a good base and adapter, what the error must name).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.adversarial.safetensors_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    WEIGHTS,
    Break,
    change_header,
    change_json,
    header,
    indexed,
    linked_out,
    text_of,
    with_header,
)

TOKENIZER = "tokenizer.json"
TEMPLATE = "template.yaml"
BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)


def in_hub_cache(link: str) -> Break:
    """The base as a snapshot whose weights are a link; blobs/evil leads out of the cache."""

    def apply(base: Path, adapter: Path) -> None:
        snapshot, cache = base / "models--o--n" / "snapshots" / "abc", base / "models--o--n"
        other = base / "models--o--other" / "blobs"
        outside = base.parent / "outside"
        for folder in (snapshot, snapshot.with_name("def"), cache / "blobs", other, outside):
            folder.mkdir(parents=True)
        weights = base / WEIGHTS
        for place in (other / "w", outside / "w", snapshot.with_name("def") / WEIGHTS):
            place.write_bytes(weights.read_bytes())
        (cache / "blobs" / "evil").symlink_to(outside / "w")
        weights.unlink()
        weights.symlink_to(Path("models--o--n") / "snapshots" / "abc" / WEIGHTS)
        (snapshot / WEIGHTS).symlink_to(link)
        (snapshot / CONFIG).write_bytes((base / CONFIG).read_bytes())
        # the folder that merge is given is the snapshot
        kept = base.with_name("kept")
        base.rename(kept)
        base.symlink_to(kept / "models--o--n" / "snapshots" / "abc")

    return apply


def link_to(of_adapter: bool, name: str, target: str) -> Break:
    def apply(base: Path, adapter: Path) -> None:
        path = (adapter if of_adapter else base) / name
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return apply


def no_file(of_adapter: bool, name: str, make: Callable[[Path], Any]) -> Break:
    def apply(base: Path, adapter: Path) -> None:
        path = (adapter if of_adapter else base) / name
        path.unlink(missing_ok=True)
        make(path)

    return apply


def sparse(of_adapter: bool, name: str, size: int, begin: bytes = b"") -> Break:
    """A file that takes no room on the disk and never ends for whoever reads or copies it."""

    def apply(base: Path, adapter: Path) -> None:
        path = (adapter if of_adapter else base) / name
        path.write_bytes(begin)
        os.truncate(path, size)

    return apply


def more_tensors(of_adapter: bool, entries: dict[str, dict[str, Any]]) -> Break:
    """Tensors without bytes beside the good ones."""

    def apply(base: Path, adapter: Path) -> None:
        path = adapter / ADAPTER if of_adapter else base / WEIGHTS
        own, data = header(path)
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
        more = {name: empty | entry for name, entry in entries.items()}
        with_header(path, json.dumps(own | more).encode(), data)

    return apply


def bare_header(text: bytes) -> Break:
    return lambda base, adapter: with_header(base / WEIGHTS, text, b"")


def shard_cut(base: Path, adapter: Path) -> None:
    indexed("model-1.safetensors")(base, adapter)
    data = (base / "model-1.safetensors").read_bytes()
    (base / "model-1.safetensors").write_bytes(data[:-4])


def shard_of_two(base: Path, adapter: Path) -> None:
    """The same tensors in both files of the index."""
    indexed("model-2.safetensors")(base, adapter)
    (base / "model-2.safetensors").write_bytes((base / "model-1.safetensors").read_bytes())


def index_linked_out(base: Path, adapter: Path) -> None:
    indexed("model-1.safetensors")(base, adapter)
    linked_out(False, INDEX)(base, adapter)


def a_terabyte(base: Path, adapter: Path) -> None:
    """One more tensor, a hole in the file: the base takes no room, a merged one would."""
    entries, data = header(base / WEIGHTS)
    entries["x"] = {"dtype": "U8", "shape": [1 << 40], "data_offsets": [len(data), len(data) + (1 << 40)]}
    with_header(base / WEIGHTS, json.dumps(entries).encode(), data)
    os.truncate(base / WEIGHTS, (base / WEIGHTS).stat().st_size + (1 << 40))


def facts(**changes: Any) -> Break:
    """What the adapter's file says of its base."""

    def apply(base: Path, adapter: Path) -> None:
        entries, data = header(adapter / ADAPTER)
        entries["__metadata__"] = {"format": "pt", "t5tune": json.dumps(changes)}
        with_header(adapter / ADAPTER, json.dumps(entries).encode(), data)

    return apply


def pattern(key: str) -> Break:
    return change_json(True, rank_pattern={key: 4})


FOLDERS: dict[str, tuple[Break, str]] = {
    # links
    "blob that leads out of the cache": (in_hub_cache("../../blobs/evil"), WEIGHTS),
    "blob of another model": (in_hub_cache("../../../models--o--other/blobs/w"), WEIGHTS),
    "file of another revision": (in_hub_cache("../def/model.safetensors"), WEIGHTS),
    "blob that isn't there": (in_hub_cache("../../blobs/none"), WEIGHTS),
    "link to itself": (link_to(False, CONFIG, CONFIG), CONFIG),
    "index linked out": (index_linked_out, INDEX),
    "tokenizer linked out": (link_to(True, "tokenizer_config.json", "/etc/hostname"), "tokenizer_config.json"),
    "base's tokenizer linked out": (link_to(False, TOKENIZER, "/etc/hostname"), TOKENIZER),
    "layout linked out": (link_to(True, TEMPLATE, "/etc/hostname"), TEMPLATE),
    "base's layout linked out": (link_to(False, TEMPLATE, "/etc/hostname"), TEMPLATE),
    "generation settings linked out": (link_to(False, "generation_config.json", "/etc/hostname"), "generation_config"),
    "link to a device": (link_to(True, ADAPTER, "/dev/zero"), ADAPTER),
    # no plain files
    "pipe for the config": (no_file(False, CONFIG, os.mkfifo), CONFIG),
    "pipe for the adapter's config": (no_file(True, ADAPTER_CONFIG, os.mkfifo), ADAPTER_CONFIG),
    "pipe for the adapter": (no_file(True, ADAPTER, os.mkfifo), ADAPTER),
    "pipe for the tokenizer": (no_file(False, TOKENIZER, os.mkfifo), TOKENIZER),
    "pipe for the layout": (no_file(True, TEMPLATE, os.mkfifo), TEMPLATE),
    "folder for the weights": (no_file(False, WEIGHTS, Path.mkdir), WEIGHTS),
    "folder for the config": (no_file(False, CONFIG, Path.mkdir), CONFIG),
    # sizes
    "tokenizer of a terabyte": (sparse(False, TOKENIZER, 1 << 40, b'{"added_tokens": []'), TOKENIZER),
    "layout of a terabyte": (sparse(True, TEMPLATE, 1 << 40), TEMPLATE),
    "generation settings of a terabyte": (sparse(False, "generation_config.json", 1 << 40), "generation_config.json"),
    "config of a terabyte": (sparse(False, CONFIG, 1 << 40), CONFIG),
    "weights of a terabyte": (a_terabyte, "output_dir: "),
    # indexes
    "index with a dot": (indexed("./model-1.safetensors"), INDEX),
    "index of another case": (indexed("MODEL-1.safetensors"), "MODEL-1.safetensors"),
    "index with a zero byte": (indexed("model-1.safetensors\0.safetensors"), "model-1"),
    "index with a wide slash": (indexed("\uff0e\uff0e\uff0fmodel-1.safetensors"), "model-1"),
    "index that writes backwards": (indexed("\u202emodel-1.safetensors"), "model-1"),
    "index with half a character": (indexed("\ud800.safetensors"), ".safetensors"),
    "index with a name without an end": (indexed("x" * 5000 + ".safetensors"), "xxx"),
    "index with an empty name": (indexed(""), INDEX),
    "shard that ends early": (shard_cut, "model-1.safetensors"),
    "tensors in two shards": (shard_of_two, "model-2.safetensors"),
    # headers
    "empty file": (text_of(False, WEIGHTS, ""), WEIGHTS),
    "header of a list": (bare_header(b"[]"), WEIGHTS),
    "header that isn't text": (bare_header(b"\xff" * 16), WEIGHTS),
    "number without an end": (bare_header(b'{"a": ' + b"9" * 100_000 + b"}"), WEIGHTS),
    "a hundred dimensions": (more_tensors(False, {"x": {"shape": [1] * 99 + [0]}}), WEIGHTS),
    "dimension of 2^70": (more_tensors(False, {"x": {"shape": [0, 1 << 70]}}), WEIGHTS),
    "dtype of a list": (more_tensors(False, {"x": {"dtype": ["F32"]}}), WEIGHTS),
    "places of fractions": (change_header(lambda e, n: e[n].update(data_offsets=[0.0, 4.0])), WEIGHTS),
    "no entry": (change_header(lambda e, n: e.update(x=None)), WEIGHTS),
    "ten thousand tensors": (more_tensors(True, {f"x{i}": {} for i in range(10_000)}), ADAPTER),
    # adapters
    "expression that never ends": (pattern(".?" * 90 + "x"), ADAPTER_CONFIG),
    "alternatives that never end": (pattern("(.|.)" * 35 + "x"), ADAPTER_CONFIG),
    "stars that never end": (pattern(".*" * 4 + "x"), ADAPTER_CONFIG),
    "expression that looks back": (pattern(r"(.*)\1\1x"), ADAPTER_CONFIG),
    "ten thousand patterns": (change_json(True, rank_pattern={f"x{i}.*y": 4 for i in range(10_000)}), ADAPTER_CONFIG),
    "module without a name": (change_json(True, modules_to_save=[""]), ADAPTER_CONFIG),
    "base with a line of code": (
        change_json(True, base_model_name_or_path='x")\nimport os; os.system("true")  #'),
        ADAPTER_CONFIG,
    ),
    "target with a line of code": (change_json(True, target_modules=["q", "v\n```\nrm -rf ~"]), ADAPTER_CONFIG),
    "alpha of 10^400": (text_of(True, ADAPTER_CONFIG, '{"peft_type": "LORA", "r": 4, "lora_alpha": 1e400}'), "alpha"),
    "code in the adapter's megatron": (
        change_json(True, megatron_core="evil", megatron_config={"a": 1}),
        ADAPTER_CONFIG,
    ),
    "targets that never end": (change_json(True, target_modules=".?" * 90 + "x"), ADAPTER_CONFIG),
    "rows of a negative token": (change_json(True, trainable_token_indices=[-1]), ""),
    "fingerprint of a list": (facts(fingerprint=[1]), ADAPTER),
    "trained onto nobody knows what": (facts(onto="nf5"), ADAPTER),
    # configs
    "code deep in the config": (change_json(False, decoder={"auto_map": {"AutoModel": "x--y.Z"}}), CONFIG),
    "attention from the hub": (change_json(False, attn_implementation="evil/kernel"), CONFIG),
    "attention from the hub, for a part": (
        change_json(False, encoder={"_attn_implementation": {"": "evil/kernel"}}),
        CONFIG,
    ),
    "config without an end": (text_of(False, CONFIG, '{"a":' * 100_000), CONFIG),
    "generation settings that are none": (text_of(False, "generation_config.json", "[1]"), "generation_config.json"),
    # layouts
    "layout that doubles": (text_of(True, TEMPLATE, BOMB), TEMPLATE),
    "layout in itself": (text_of(True, TEMPLATE, "system: &a [*a]\n"), TEMPLATE),
    "layout that runs": (text_of(True, TEMPLATE, "system: !!python/object/apply:os.system [true]\n"), TEMPLATE),
    "layout of a day that never was": (text_of(True, TEMPLATE, "system: 2001-99-99\n"), TEMPLATE),
    "layout nested without an end": (text_of(True, TEMPLATE, "system: " + "[" * 50_000), TEMPLATE),
    "layout with a list for a key": (text_of(True, TEMPLATE, "? [a]\n: b\n"), TEMPLATE),
    "layout of noise": (lambda b, a: (a / TEMPLATE).write_bytes(b"\xff\xfe\x00" * 99), TEMPLATE),
}
