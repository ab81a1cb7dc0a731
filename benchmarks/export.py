"""Compare `t5tune export` with DeepSpeed's zero_to_fp32.py on the same checkpoint.

    python benchmarks/export.py --config flan-t5-small.json [--folder F] [--runs 3] [--sides ours theirs]

Makes the checkpoint with the shape of a model's config.json: two ranks of ZeRO-3, LoRA of rank 8 on q and v with random
fp32 master weights and Adam states, and the base in bf16 as frozen fragments. These are holes in sparse files, so that
a model of any size fits on the disk. DeepSpeed's script ("theirs") leaves the frozen weights out, as export ("ours")
does. Each side runs in its own process, start-up included; the sides take turns, `runs` times, and the fastest run of
each counts. Prints one JSON line: wall and CPU seconds, peak memory (MB, VmHWM), and whether the tensors of both sides
have the same bits.
"""

import argparse
import json
import math
import os
import pickle
import struct
import tempfile
from pathlib import Path
from typing import Any

from sides import run_script

RANKS = 2
RANK = 8
STEP = 100
ALIGNMENT = 64
SIDES = ("ours", "theirs")

OURS = """
from t5tune.cli import run
run(["export", arguments[0], "--output-dir", arguments[1], "--quiet"])
"""
THEIRS = """
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
convert_zero_checkpoint_to_fp32_state_dict(*arguments, exclude_frozen_parameters=True)
"""


class Hole:
    """A tensor of zeros, which is a hole in the file; with `values`, a tensor whose bytes are written."""

    def __init__(self, shape: tuple[int, ...], dtype: str, values: bytes | None = None) -> None:
        self.shape = shape
        self.dtype = dtype
        self.values = values
        self.bytes = math.prod(shape) * (2 if dtype == "BFloat16" else 4)


class Pickler(pickle.Pickler):
    """Pickles a Hole as torch pickles a tensor."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[Hole] = []

    def persistent_id(self, value: Any) -> Any:
        import torch

        if not isinstance(value, tuple) or len(value) != 2 or value[0] is not Hole:
            return None
        self.storages.append(value[1])
        kind = getattr(torch, f"{value[1].dtype}Storage")
        return ("storage", kind, str(len(self.storages) - 1), "cpu", math.prod(value[1].shape))

    def reducer_override(self, value: Any) -> Any:
        import torch

        if not isinstance(value, Hole):
            return NotImplemented
        strides = tuple(math.prod(value.shape[place + 1 :]) for place in range(len(value.shape)))
        return torch._utils._rebuild_tensor_v2, ((Hole, value), 0, value.shape, strides, False, {})


def save(path: Path, state: Any) -> None:
    """Write what torch.save would, but with holes and without CRC checksums of the members (torch has that option)."""
    import io

    pickled = io.BytesIO()
    pickler = Pickler(pickled)
    pickler.dump(state)
    members = [("data.pkl", pickled.getvalue(), 0), ("byteorder", b"little", 0), ("version", b"3\n", 0)]
    members += [(f"data/{key}", hole.values or b"", hole.bytes) for key, hole in enumerate(pickler.storages)]
    table = b""
    with open(path, "wb") as file:
        for member, data, length in members:
            name = f"archive/{member}".encode()
            begin, size = file.tell(), max(length, len(data))
            padding = -(begin + 30 + len(name) + 4) % ALIGNMENT
            file.write(struct.pack("<4s5H3I2H", b"PK\3\4", 45, 8, 0, 0, 0, 0, 0, 0, len(name), padding + 4))
            file.write(name + struct.pack("<2H", 0x4246, padding) + b"\0" * padding + data)
            file.seek(size - len(data), os.SEEK_CUR)
            extra = struct.pack("<2H3Q", 1, 24, size, size, begin)
            table += struct.pack(
                "<4s6H3I5H2I", b"PK\1\2", 45, 45, 8, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF,
                len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF,
            )  # fmt: skip
            table += name + extra
            # the data descriptor, which follows a member if its local header has no sizes
            file.write(struct.pack("<4sI2Q", b"PK\7\x08", 0, size, size))
        begin = file.tell()
        end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(members), len(members), len(table), begin)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, begin + len(table), 1)
        end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        file.write(table + end)


def make_checkpoint(folder: Path, config_file: Path, num_ranks: int = RANKS, lora_r: int = RANK) -> int:
    """Write a DeepSpeed checkpoint of the model's shape; return the size of its adapter in bytes."""
    import numpy as np
    import torch

    from t5tune.families import find_architecture

    config = json.loads(config_file.read_text())
    shapes = find_architecture(config, config_file).derive_shapes()
    frozen = {name: shape for name, shape in shapes.items() if "embed_tokens" not in name}
    prefix, adapted = "base_model.model.", {}
    for name, (out, inner) in ((n, s) for n, s in shapes.items() if n.endswith((".q.weight", ".v.weight"))):
        module = prefix + name.removesuffix(".weight")
        adapted[f"{module}.lora_A.default.weight"] = (lora_r, inner)
        adapted[f"{module}.lora_B.default.weight"] = (out, lora_r)
    length = sum(math.prod(shape) // num_ranks for shape in adapted.values())
    shards = folder / f"global_step{STEP}"
    shards.mkdir(parents=True)
    (folder / "latest").write_text(shards.name)
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(config))
    adapter = {"peft_type": "LORA", "r": lora_r, "lora_alpha": 16, "target_modules": ["q", "v"]}
    adapter["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    generator = np.random.default_rng(0)
    names = {name: f"{prefix}{name}" for name in frozen}
    for rank in range(num_ranks):
        values = generator.standard_normal(length, np.float32)
        flat = Hole((length,), "Float", values.tobytes())
        states = {"exp_avg": Hole((length,), "Float"), "exp_avg_sq": Hole((length,), "Float"), "step": STEP}
        optimizer = {
            "zero_stage": 3,
            "partition_count": num_ranks,
            "fp32_flat_groups": [flat],
            "optimizer_state_dict": {"state": {0: states}, "param_groups": [{"params": [0]}]},
        }
        save(shards / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": optimizer})
        model = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [{name: torch.Size(shape) for name, shape in adapted.items()}],
            "frozen_param_shapes": {names[name]: torch.Size(shape) for name, shape in frozen.items()},
            "frozen_param_fragments": {
                names[name]: Hole((math.ceil(math.prod(shape) / num_ranks),), "BFloat16")
                for name, shape in frozen.items()
            },
            "shared_params": {},
            "ds_version": "0.19.8",
            "global_steps": STEP,
            "dp_world_size": num_ranks,
            "mp_world_size": 1,
        }
        save(shards / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", model)
    return 4 * length * num_ranks


def run_side(side: str, checkpoint: Path, output: Path) -> dict[str, float]:
    body = OURS if side == "ours" else THEIRS
    return run_script(body, [checkpoint, output], output.with_suffix(".txt"), DS_ACCELERATOR="cpu")


def is_bitwise_equal(ours: Path, theirs: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    exported = load_file(ours / "adapter_model.safetensors")
    gathered = torch.load(theirs / "pytorch_model.bin", weights_only=True)
    gathered = {name.replace(".default", ""): value for name, value in gathered.items()}
    return exported.keys() == gathered.keys() and all(torch.equal(exported[n], v) for n, v in gathered.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="config.json of a T5, mT5 or umT5")
    parser.add_argument("--folder", type=Path, help="working folder; default: the system's temporary folder")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        size = make_checkpoint(folder / "checkpoint", options.config)
        files = list((folder / "checkpoint").rglob("*.pt"))
        best: dict[str, dict[str, float]] = {}
        for number in range(options.runs):
            for side in options.sides:
                found = run_side(side, folder / "checkpoint", folder / f"{side}-{number}")
                if side not in best or found["wall"] < best[side]["wall"]:
                    best[side] = found
        result = {
            "config": options.config.name,
            "adapter_mb": round(size / 1e6, 1),
            "checkpoint_mb": round(sum(path.stat().st_size for path in files) / 1e6),
            "sides": best,
        }
        if len(best) == 2:
            result["ratio"] = {key: round(best["ours"][key] / best["theirs"][key], 3) for key in best["ours"]}
            result["same_bits"] = is_bitwise_equal(folder / "ours-0", folder / "theirs-0")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
