"""Checkpoint folders of two DeepSpeed ranks, good and bad.

The good folders follow DeepSpeed's documented format; tests/support/ranks/deepspeed_saves.py runs DeepSpeed itself.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from t5tune.io.atomic import encode_json
from t5tune.runs.checkpoints import CHECKPOINT_FORMAT

PREFIX = "base_model.model."
MODULE = PREFIX + "encoder.block.0.layer.0.SelfAttention.q"
SHAPES = {f"{MODULE}.lora_A.default.weight": (3, 7), f"{MODULE}.lora_B.default.weight": (5, 3)}
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q"], "base_model_name_or_path": None}
RANKS = 2

Spoil = Callable[[Path], Any]


def values() -> dict[str, torch.Tensor]:
    """Return the expected tensors, by the names in PEFT's file."""
    generator = torch.Generator().manual_seed(5)
    return {name.replace(".default", ""): torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def make(folder: Path, stage: int = 3, padding: int = 0) -> Path:
    """Make a folder as DeepSpeed writes it: latest, global_step4 with two ranks' files, and adapter_config.json."""
    shards = folder / "global_step4"
    shards.mkdir(parents=True)
    (folder / "latest").write_text("global_step4")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    flat = [value.flatten() for value in values().values()]
    model = {
        "module": {},
        "param_shapes": [{name: torch.Size(shape) for name, shape in SHAPES.items()}],
        "frozen_param_shapes": None,
        "shared_params": {},
        "global_steps": 4,
        "dp_world_size": RANKS,
        "mp_world_size": 1,
    }
    for rank in range(RANKS):
        if stage == 3:
            parts = []
            for value in flat:
                part = math.ceil(len(value) / RANKS)
                padded = torch.cat([value, torch.zeros(part * RANKS - len(value))])
                parts.append(padded[rank * part : (rank + 1) * part])
            optimizer = {"fp32_flat_groups": [torch.cat(parts)], "zero_stage": 3, "partition_count": RANKS}
            torch.save(model, shards / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        else:
            whole = torch.cat([flat[0], torch.full((padding,), torch.nan), *flat[1:]])
            part = math.ceil(len(whole) / RANKS)
            groups = [whole[rank * part : (rank + 1) * part].clone()]
            optimizer = {"single_partition_of_fp32_groups": groups, "zero_stage": stage, "partition_count": [RANKS]}
            optimizer["param_alignment_paddings"] = [[padding, 0]]
            torch.save(model, shards / "mp_rank_00_model_states.pt")
        path = shards / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer, "ds_version": "0.0"}, path)
    return folder


def universal(folder: Path) -> Path:
    """Make the same in DeepSpeed's universal format."""
    make(folder)
    (folder / "latest").rename(folder / "latest_universal")
    for path in (folder / "global_step4").glob("*_optim_states.pt"):
        path.unlink()
    for name, value in zip(SHAPES, values().values(), strict=True):
        (folder / "global_step4" / "zero" / name).mkdir(parents=True)
        torch.save(value.flatten(), folder / "global_step4" / "zero" / name / "fp32.pt")
    return folder


def shard(folder: Path, rank: int) -> Path:
    return folder / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model_file(folder: Path, rank: int = 0) -> Path:
    return folder / "global_step4" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def change(path: Path, changes: dict[str, Any], key: str | None = None) -> None:
    """Change a file's dict, or the dict under a key. A value that is a function is called with the old value."""
    state = torch.load(path, weights_only=True)
    found = state if key is None else state[key]
    for name, value in changes.items():
        found[name] = value(found.get(name)) if callable(value) else value
    torch.save(state, path)


def optimizer(rank: int = 1, **changes: Any) -> Spoil:
    return lambda folder: change(shard(folder, rank), changes, "optimizer_state_dict")


def model(**changes: Any) -> Spoil:
    return lambda folder: change(model_file(folder), changes)


def config(**changes: Any) -> Spoil:
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))


def latest(content: bytes) -> Spoil:
    return lambda folder: (folder / "latest").write_bytes(content)


def copied(old: str, new: str) -> Spoil:
    """Copy rank 1's shard, and replace `old` in the copy's name."""
    return lambda folder: shutil.copy(shard(folder, 1), str(shard(folder, 1)).replace(old, new))


def parameter(value: Any) -> Spoil:
    """Replace a parameter in the universal format."""
    return lambda folder: torch.save(value, folder / STATES / "zero" / A / "fp32.pt")


def linked(name: str) -> Spoil:
    """Move a file or folder out of the checkpoint, and leave a link to it."""

    def spoil(folder: Path) -> None:
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return spoil


def build_manifest(files: dict[str, Any]) -> str:
    """Build a manifest whose own checksum is correct."""
    manifest = {"format": CHECKPOINT_FORMAT, "step": 4, "world_size": RANKS, "made_of": {}, "files": files}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return encode_json({**manifest, "sha256": digest}).decode()


def _lengthen(groups: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat([group, torch.ones(9)]) for group in groups]


A, B = SHAPES
STATES = "global_step4"

FOLDERS: dict[str, tuple[Spoil, str]] = {
    # ranks
    "a rank is missing": (lambda f: shard(f, 1).unlink(), "rank 1 is missing"),
    "a rank exists twice": (copied("zero_pp", "bf16_zero_pp"), "two files for rank 1"),
    "a rank exists twice, with a leading zero": (copied("rank_1", "rank_01"), "two files for rank 1"),
    "a rank of another run": (copied("rank_1", "rank_7"), "shards of ranks"),
    "a file of tensor parallelism": (copied("rank_00", "rank_01"), "model parallelism"),
    "a file of experts": (copied("zero_pp_rank_1", "expp_rank_0"), "experts"),
    "no model states of a rank": (lambda f: model_file(f, 1).unlink(), "model states of ranks .0.*rank 1 is missing"),
    "no model states": (lambda f: [model_file(f, rank).unlink() for rank in range(RANKS)], "no shards|no checkpoint"),
    "partition_count of 3": (optimizer(partition_count=3), "in a run of 3 ranks"),
    "partition_count differs": (optimizer(0, partition_count=[2, 1]), "in a run of 1 rank"),
    "partition_count is a string": (optimizer(partition_count="2"), "partition_count: expected a non-negative integer"),
    "partition_count is missing": (optimizer(partition_count=None), "partition_count: expected a non-negative integer"),
    "groups of 4 partitions": (optimizer(ds_zero_partition_groups=[{"partition_count": 4}]), "in a run of 4 ranks"),
    "groups are a string": (optimizer(ds_zero_partition_groups="x"), "expected a list"),
    "another stage": (optimizer(zero_stage=2), "single_partition_of_fp32_groups|different runs"),
    "stage 7": (optimizer(zero_stage=7), "zero_stage must be 1, 2 or 3"),
    "stage is a string": (optimizer(zero_stage="3"), "zero_stage must be 1, 2 or 3"),
    "stage is a list": (optimizer(zero_stage=[3]), "zero_stage must be 1, 2 or 3"),
    "world size 3": (model(dp_world_size=3), "but training used 3 ranks"),
    "world size 0": (model(dp_world_size=0), "training used 0 ranks"),
    "world size 2^39": (model(dp_world_size=1 << 39), "but training used"),
    "world size is a string": (model(dp_world_size="2"), "dp_world_size: expected a non-negative integer"),
    "world size is true": (model(dp_world_size=True), "dp_world_size: expected a non-negative integer"),
    "no world size": (model(dp_world_size=None), "dp_world_size: expected a non-negative integer"),
    "model parallelism": (model(mp_world_size=2), "model parallelism"),
    "steps are a string": (model(global_steps="4"), "global_steps: expected a non-negative integer"),
    "steps are -4": (model(global_steps=-4), "global_steps: expected a non-negative integer"),
    # states of the wrong types
    "state is a list": (lambda f: torch.save([1], model_file(f)), "expected a dict"),
    "state is a tensor": (lambda f: torch.save(torch.ones(2), shard(f, 1)), "expected a dict"),
    "optimizer state is a list": (lambda f: torch.save({"optimizer_state_dict": [1]}, shard(f, 1)), "expected a dict"),
    "no optimizer": (lambda f: torch.save({}, shard(f, 1)), "expected a dict"),
    "no groups": (optimizer(fp32_flat_groups=[]), "contains no fp32_flat_groups"),
    "groups are a dict": (optimizer(fp32_flat_groups={}), "contains no fp32_flat_groups"),
    "groups are numbers": (optimizer(fp32_flat_groups=[1.0]), "contains no fp32_flat_groups"),
    "groups are integers": (optimizer(fp32_flat_groups=[torch.arange(19)]), "I64, expected F32"),
    "a group in another dtype": (optimizer(fp32_flat_groups=lambda g: [g[0].half()]), "different runs"),
    "an additional group": (optimizer(fp32_flat_groups=lambda g: [*g, torch.ones(2)]), "different runs|groups differ"),
    "too few values": (optimizer(fp32_flat_groups=lambda g: [g[0][:-3].clone()]), "the shards are too short"),
    "too many values": (optimizer(fp32_flat_groups=_lengthen), "rank 1 has 28 values, but its parameters need 19"),
    "a value is NaN": (optimizer(fp32_flat_groups=lambda g: [g[0] * math.nan]), "NaN or infinity"),
    "zeros": (lambda f: [optimizer(r, fp32_flat_groups=lambda g: [g[0] * 0])(f) for r in (0, 1)], "lora_B is zero"),
    # names and shapes
    "shapes are a string": (model(param_shapes="x"), "expected a dict"),
    "shapes are a list": (model(param_shapes=[[A]]), "expected a dict"),
    "a shape is a string": (model(param_shapes=[{A: "3, 7", B: (5, 3)}]), "expected names with shapes"),
    "a shape has floats": (model(param_shapes=[{A: (3.0, 7.0), B: (5, 3)}]), "expected names with shapes"),
    "a shape of -3": (model(param_shapes=[{A: (-3, 7), B: (5, 3)}]), "expected names with shapes"),
    "a shape of 2^60": (model(param_shapes=[{A: (1 << 60, 7), B: (5, 3)}]), "expected names with shapes"),
    "a shape of 2^39 x 2^39": (model(param_shapes=[{A: (1 << 39, 1 << 39), B: (5, 3)}]), "duplicate or too large"),
    "a shape of 2^38": (model(param_shapes=[{A: (1 << 38,), B: (5, 3)}]), "the shards are too short"),
    "a name is a number": (model(param_shapes=[{1: (3, 7), B: (5, 3)}]), "expected names with shapes"),
    "a name in two groups": (model(param_shapes=[{A: (3, 7)}, {A: (5, 3)}]), "duplicate"),
    "no shapes": (model(param_shapes=[]), "lists no trained parameters"),
    "half of a LoRA pair is missing": (model(param_shapes=[{A: (3, 7), "x": (5, 3)}]), "lora_B is missing"),
    "a rank that contradicts the config": (config(r=4), "rank 3, but .* says r 4"),
    "config is a string": (lambda f: (f / "adapter_config.json").write_text('"x"'), "expected a JSON object"),
    "endless config": (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), "can't be read"),
    "config of another kind of adapter": (config(peft_type="LOHA"), "only LORA"),
    "alpha is a string": (config(lora_alpha="6"), "lora_alpha: '6': expected a number"),
    "r is a string": (config(r="3"), "rank 3, but|r: .*3"),
    "target_modules that the adapter doesn't adapt": (config(target_modules=["k"]), "target_modules k"),
    "token rows that the adapter doesn't have": (config(trainable_token_indices=[1]), "has no trained token rows"),
    # out of the folder
    "latest: parent folder": (latest(b"../outside"), "not the name of a folder"),
    "latest: absolute": (latest(b"/etc"), "not the name of a folder"),
    "latest: dots": (latest(b".."), "not the name of a folder"),
    "latest: empty": (latest(b""), "not the name of a folder"),
    "latest: two names": (latest(b"global_step4\nx"), "not the name of a folder"),
    "latest: zero bytes": (latest(b"global_step4\0"), "not the name of a folder"),
    "latest: random bytes": (latest(bytes(range(128, 256))), "not the name of a folder|contains no shards"),
    "latest: long": (latest(b"x" * (1 << 20)), "not the name of a folder"),
    "latest: missing folder": (latest(b"global_step5"), "contains no shards"),
    "a shard is a link": (linked(f"{STATES}/zero_pp_rank_1_mp_rank_00_optim_states.pt"), "outside the folder"),
    "model states are a link": (linked(f"{STATES}/zero_pp_rank_0_mp_rank_00_model_states.pt"), "outside"),
    "shards in a linked folder": (linked(STATES), "outside the folder"),
    "config is a link": (linked("adapter_config.json"), "outside the folder"),
    "tokenizer is a link": (lambda f: (f / "tokenizer.json").symlink_to("/etc/hostname"), "outside the folder"),
    "latest is a link": (linked("latest"), "outside the folder"),
    "a link to itself": (lambda f: (f / "tokenizer.json").symlink_to(f / "tokenizer.json"), "link"),
    "a pipe for a shard": (lambda f: [shard(f, 1).unlink(), os.mkfifo(shard(f, 1))], "regular file"),
    # manifests
    **{
        f"manifest is {content[:12]}": (
            lambda f, content=content: (f / "t5tune_manifest.json").write_text(content),  # type: ignore[misc]
            "t5tune_manifest",
        )
        for content in (
            "[]",
            "3",
            '{"files": []}',
            '{"files": {"latest": 3}}',
            '{"files": {"latest": {}}}',
            "[" * 99_999,
        )
    },
    "manifest of a file elsewhere": (
        lambda f: (f / "t5tune_manifest.json").write_text(build_manifest({"../x": {"bytes": 1, "sha256": ""}})),
        "not a file of this folder",
    ),
}


def flip_a_bit_of_a_value(folder: Path) -> None:
    path = folder / STATES / "zero" / A / "fp32.pt"
    data = bytearray(path.read_bytes())
    offset = bytes(data).find(next(iter(values().values())).flatten()[-2:].numpy().tobytes())
    assert offset > 0
    data[offset] ^= 1
    path.write_bytes(data)


UNIVERSALS: dict[str, tuple[Spoil, str]] = {
    "a bit of a value is flipped": (flip_a_bit_of_a_value, r"fp32\.pt: .*differs from what was written"),
    "a parameter is missing": (lambda f: (f / STATES / "zero" / A / "fp32.pt").unlink(), r"fp32\.pt: missing"),
    "a parameter is too short": (parameter(torch.ones(3)), r"expected a tensor of shape \[3, 7\]"),
    "a parameter is a string": (parameter({"param": "x"}), "expected a tensor"),
    "a parameter has integers": (parameter(torch.arange(21)), "expected a tensor"),
    "a name with dots": (model(param_shapes=[{"../../x": (3, 7), B: (5, 3)}]), "not a valid parameter name"),
    "a name is absolute": (model(param_shapes=[{"/etc/x": (3, 7), B: (5, 3)}]), "not a valid parameter name"),
    "a name with a zero byte": (model(param_shapes=[{"x\0": (3, 7), B: (5, 3)}]), "not a valid parameter name"),
    "an endless name": (model(param_shapes=[{"x" * 5000: (3, 7), B: (5, 3)}]), "not a valid parameter name"),
    "a parameter is a link": (linked(f"{STATES}/zero/{A}/fp32.pt"), "outside the folder"),
    "a linked folder": (linked(f"{STATES}/zero"), "outside the folder"),
    "no shapes": (model(param_shapes=None), "lists no trained parameters"),
}
