"""More untrusted bases and adapters: links, names, headers, configs, and the files next to the weights.

`FOLDERS` has the form of `safetensors_files.CASES`: case -> (what breaks a good base and adapter, what the error must
name).
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


def link_to(of_adapter: bool, name: str, target: str) -> Break:
    def apply(base: Path, adapter: Path) -> None:
        path = (adapter if of_adapter else base) / name
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return apply


def not_a_file(of_adapter: bool, name: str, make: Callable[[Path], Any]) -> Break:
    def apply(base: Path, adapter: Path) -> None:
        path = (adapter if of_adapter else base) / name
        path.unlink(missing_ok=True)
        make(path)

    return apply


def sparse(of_adapter: bool, name: str, size: int, begin: bytes = b"") -> Break:
    """Make a file that takes no space on disk, but would never end when it is read or copied."""

    def apply(base: Path, adapter: Path) -> None:
        path = (adapter if of_adapter else base) / name
        path.write_bytes(begin)
        os.truncate(path, size)

    return apply


def more_tensors(of_adapter: bool, entries: dict[str, dict[str, Any]]) -> Break:
    """Add tensors without bytes to the good ones."""

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
    """Put the same tensors into both files of the index."""
    indexed("model-2.safetensors")(base, adapter)
    (base / "model-2.safetensors").write_bytes((base / "model-1.safetensors").read_bytes())


def index_linked_out(base: Path, adapter: Path) -> None:
    indexed("model-1.safetensors")(base, adapter)
    linked_out(False, INDEX)(base, adapter)


def a_terabyte(base: Path, adapter: Path) -> None:
    """Add a tensor that is a hole in a sparse file: the base takes no disk space, but a merged checkpoint would."""
    entries, data = header(base / WEIGHTS)
    entries["x"] = {"dtype": "U8", "shape": [1 << 40], "data_offsets": [len(data), len(data) + (1 << 40)]}
    with_header(base / WEIGHTS, json.dumps(entries).encode(), data)
    os.truncate(base / WEIGHTS, (base / WEIGHTS).stat().st_size + (1 << 40))


def base_metadata(**changes: Any) -> Break:
    """Change what the adapter's file says about its base."""

    def apply(base: Path, adapter: Path) -> None:
        entries, data = header(adapter / ADAPTER)
        entries["__metadata__"] = {"format": "pt", "t5tune": json.dumps(changes)}
        with_header(adapter / ADAPTER, json.dumps(entries).encode(), data)

    return apply


def pattern(key: str) -> Break:
    return change_json(True, rank_pattern={key: 4})


FOLDERS: dict[str, tuple[Break, str]] = {
    # links
    "blob that links out of the cache": (in_hub_cache("../../blobs/evil"), WEIGHTS),
    "blob of another model": (in_hub_cache("../../../models--o--other/blobs/w"), WEIGHTS),
    "file of another revision": (in_hub_cache("../def/model.safetensors"), WEIGHTS),
    "blob that doesn't exist": (in_hub_cache("../../blobs/none"), WEIGHTS),
    "link to itself": (link_to(False, CONFIG, CONFIG), CONFIG),
    "index linked out": (index_linked_out, INDEX),
    "tokenizer linked out": (link_to(True, "tokenizer_config.json", "/etc/hostname"), "tokenizer_config.json"),
    "base's tokenizer linked out": (link_to(False, TOKENIZER, "/etc/hostname"), TOKENIZER),
    "template linked out": (link_to(True, TEMPLATE, "/etc/hostname"), TEMPLATE),
    "base's template linked out": (link_to(False, TEMPLATE, "/etc/hostname"), TEMPLATE),
    "generation config linked out": (link_to(False, "generation_config.json", "/etc/hostname"), "generation_config"),
    "link to a device": (link_to(True, ADAPTER, "/dev/zero"), ADAPTER),
    # not regular files
    "pipe for the config": (not_a_file(False, CONFIG, os.mkfifo), CONFIG),
    "pipe for the adapter's config": (not_a_file(True, ADAPTER_CONFIG, os.mkfifo), ADAPTER_CONFIG),
    "pipe for the adapter": (not_a_file(True, ADAPTER, os.mkfifo), ADAPTER),
    "pipe for the tokenizer": (not_a_file(False, TOKENIZER, os.mkfifo), TOKENIZER),
    "pipe for the template": (not_a_file(True, TEMPLATE, os.mkfifo), TEMPLATE),
    "folder for the weights": (not_a_file(False, WEIGHTS, Path.mkdir), WEIGHTS),
    "folder for the config": (not_a_file(False, CONFIG, Path.mkdir), CONFIG),
    # sizes
    "tokenizer of a terabyte": (sparse(False, TOKENIZER, 1 << 40, b'{"added_tokens": []'), TOKENIZER),
    "template of a terabyte": (sparse(True, TEMPLATE, 1 << 40), TEMPLATE),
    "generation config of a terabyte": (sparse(False, "generation_config.json", 1 << 40), "generation_config.json"),
    "config of a terabyte": (sparse(False, CONFIG, 1 << 40), CONFIG),
    "weights of a terabyte": (a_terabyte, "output_dir: "),
    # indexes
    "index with a dot": (indexed("./model-1.safetensors"), INDEX),
    "index in upper case": (indexed("MODEL-1.safetensors"), "MODEL-1.safetensors"),
    "index with a zero byte": (indexed("model-1.safetensors\0.safetensors"), "model-1"),
    "index with a fullwidth slash": (indexed("\uff0e\uff0e\uff0fmodel-1.safetensors"), "model-1"),
    "index with a right-to-left override": (indexed("\u202emodel-1.safetensors"), "model-1"),
    "index with a lone surrogate": (indexed("\ud800.safetensors"), ".safetensors"),
    "index with an endless name": (indexed("x" * 5000 + ".safetensors"), "xxx"),
    "index with an empty name": (indexed(""), INDEX),
    "shard that ends early": (shard_cut, "model-1.safetensors"),
    "tensors in two shards": (shard_of_two, "model-2.safetensors"),
    # headers
    "empty file": (text_of(False, WEIGHTS, ""), WEIGHTS),
    "header is a list": (bare_header(b"[]"), WEIGHTS),
    "header that isn't text": (bare_header(b"\xff" * 16), WEIGHTS),
    "endless number": (bare_header(b'{"a": ' + b"9" * 100_000 + b"}"), WEIGHTS),
    "a hundred dimensions": (more_tensors(False, {"x": {"shape": [1] * 99 + [0]}}), WEIGHTS),
    "dimension of 2^70": (more_tensors(False, {"x": {"shape": [0, 1 << 70]}}), WEIGHTS),
    "dtype is a list": (more_tensors(False, {"x": {"dtype": ["F32"]}}), WEIGHTS),
    "offsets are fractions": (change_header(lambda e, n: e[n].update(data_offsets=[0.0, 4.0])), WEIGHTS),
    "entry is null": (change_header(lambda e, n: e.update(x=None)), WEIGHTS),
    "ten thousand tensors": (more_tensors(True, {f"x{i}": {} for i in range(10_000)}), ADAPTER),
    # adapters
    "expression that takes forever": (pattern(".?" * 90 + "x"), ADAPTER_CONFIG),
    "alternatives that take forever": (pattern("(.|.)" * 35 + "x"), ADAPTER_CONFIG),
    "stars that take forever": (pattern(".*" * 4 + "x"), ADAPTER_CONFIG),
    "expression with a backreference": (pattern(r"(.*)\1\1x"), ADAPTER_CONFIG),
    "expression with a set in a set": (pattern("[[q]"), ADAPTER_CONFIG),
    "ten thousand patterns": (change_json(True, rank_pattern={f"x{i}.*y": 4 for i in range(10_000)}), ADAPTER_CONFIG),
    "module without a name": (change_json(True, modules_to_save=[""]), ADAPTER_CONFIG),
    "base with a line of code": (
        change_json(True, base_model_name_or_path='x")\nimport os; os.system("true")  #'),
        ADAPTER_CONFIG,
    ),
    "target with a line of code": (change_json(True, target_modules=["q", "v\n```\nrm -rf ~"]), ADAPTER_CONFIG),
    "alpha of 10^400": (text_of(True, ADAPTER_CONFIG, '{"peft_type": "LORA", "r": 4, "lora_alpha": 1e400}'), "alpha"),
    "code in the adapter's megatron config": (
        change_json(True, megatron_core="evil", megatron_config={"a": 1}),
        ADAPTER_CONFIG,
    ),
    "targets that take forever": (change_json(True, target_modules=".?" * 90 + "x"), ADAPTER_CONFIG),
    "row of a negative token id": (change_json(True, trainable_token_indices=[-1]), ""),
    "fingerprint is a list": (base_metadata(fingerprint=[1]), ADAPTER),
    "trained with an unknown quantization": (base_metadata(onto="nf5"), ADAPTER),
    # configs
    "code deep in the config": (change_json(False, decoder={"auto_map": {"AutoModel": "x--y.Z"}}), CONFIG),
    "attention kernel from the Hub": (change_json(False, attn_implementation="evil/kernel"), CONFIG),
    "attention kernel from the Hub, for the encoder": (
        change_json(False, encoder={"_attn_implementation": {"": "evil/kernel"}}),
        CONFIG,
    ),
    "endless config": (text_of(False, CONFIG, '{"a":' * 100_000), CONFIG),
    "generation config is a list": (text_of(False, "generation_config.json", "[1]"), "generation_config.json"),
    # conversation templates
    "template that grows exponentially": (text_of(True, TEMPLATE, BOMB), TEMPLATE),
    "template that contains itself": (text_of(True, TEMPLATE, "system: &a [*a]\n"), TEMPLATE),
    "template that runs code": (text_of(True, TEMPLATE, "system: !!python/object/apply:os.system [true]\n"), TEMPLATE),
    "template with an impossible date": (text_of(True, TEMPLATE, "system: 2001-99-99\n"), TEMPLATE),
    "endlessly nested template": (text_of(True, TEMPLATE, "system: " + "[" * 50_000), TEMPLATE),
    "template with a list as a key": (text_of(True, TEMPLATE, "? [a]\n: b\n"), TEMPLATE),
    "template of random bytes": (lambda b, a: (a / TEMPLATE).write_bytes(b"\xff\xfe\x00" * 99), TEMPLATE),
}
