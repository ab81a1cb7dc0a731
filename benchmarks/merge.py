"""Compare `t5tune merge` with copying the base's files and with PEFT's merge_and_unload.

    python benchmarks/merge.py --config flan-t5-small.json [--folder F] [--runs 3] [--sides ours cp peft]

Makes the base with the shape of a model's config.json and random weights in the config's dtype (else fp32), a few rows
at a time; the adapter is LoRA of rank 8 on q and v. No side verifies its result. Each side runs in its own process,
start-up included; the sides take turns, `runs` times, and the fastest run of each counts; the median is printed too.
`cp` copies the base's files, which is the lower bound for a merge. Prints one JSON line: wall and CPU seconds, peak
memory (MB, VmHWM), and whether t5tune's and PEFT's weights have the same bits.
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from sides import run_script

RANK = 8
SIDES = ("ours", "cp", "peft")
BLOCK_SIZE = 1 << 22  # values that are generated at a time
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

BODIES = {
    "ours": """
from t5tune.cli import run
flags = ["--model-name-or-path", base, "--adapter", adapter, "--output-dir", output, "--no-verify", "--quiet"]
assert run(["merge", *flags]) == 0
""",
    "cp": """
import shutil
shutil.copytree(base, output)
""",
    "peft": """
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
""",
}


def write_random(file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], scale: float) -> None:
    """Write a safetensors file of normally distributed values, one block at a time."""
    import numpy as np

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = np.random.default_rng(0)
    with open(file, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for dtype, shape in tensors.values():
            count = math.prod(shape)
            for start in range(0, count, BLOCK_SIZE):
                values = generator.standard_normal(min(BLOCK_SIZE, count - start), np.float32) * np.float32(scale)
                if dtype == "BF16":
                    stream.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
                else:
                    stream.write(values.astype(np.float16 if dtype == "F16" else np.float32).tobytes())


def make_base(folder: Path, config: dict[str, Any]) -> int:
    """Write a random base of the config's shape; return its size in bytes."""
    from t5tune.families import find_architecture

    folder.mkdir()
    dtype = DTYPES[config.get("dtype") or config.get("torch_dtype") or "float32"]
    shapes = find_architecture(config, folder).derive_shapes().items()
    tensors = {name: (dtype, shape) for name, shape in shapes if "embed_tokens" not in name}
    write_random(folder / "model.safetensors", tensors, 0.05)
    (folder / "config.json").write_text(json.dumps(config))
    return (folder / "model.safetensors").stat().st_size


def make_adapter(folder: Path, base: Path, config: dict[str, Any], lora_r: int = RANK) -> None:
    from t5tune.families import find_architecture

    folder.mkdir()
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    shapes = find_architecture(config, base).derive_shapes()
    for name in (name for name in shapes if name.endswith((".q.weight", ".v.weight"))):
        out, inner = shapes[name]
        module = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = ("F32", (lora_r, inner))
        tensors[f"{module}.lora_B.weight"] = ("F32", (out, lora_r))
    write_random(folder / "adapter_model.safetensors", tensors, 0.1)
    adapter = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "r": lora_r,
        "lora_alpha": 16,
        "target_modules": ["q", "v"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": str(base)}))


def run_side(side: str, base: Path, adapter: Path, output: Path) -> dict[str, float]:
    body = "base, adapter, output = arguments" + BODIES[side]
    return run_script(body, [base, adapter, output], output.with_suffix(".txt"), HF_HUB_OFFLINE="1")


def is_bitwise_equal(ours: Path, theirs: Path) -> bool:
    """Whether all tensors that are in both checkpoints are equal; PEFT's may lack those that transformers ties."""
    import torch

    from t5tune.checkpoints.base_tensors import Checkpoint
    from t5tune.model.load import to_torch

    left, right = Checkpoint(ours), Checkpoint(theirs)
    return all(
        torch.equal(to_torch(left.get_tensor(name), torch.float32), to_torch(right.get_tensor(name), torch.float32))
        for name in set(left.list_names()) & set(right.list_names())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="config.json of a T5, mT5 or umT5")
    parser.add_argument("--folder", type=Path, help="working folder; default: the system's temporary folder")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        base, adapter = folder / "base", folder / "adapter"
        size = make_base(base, config)
        make_adapter(adapter, base, config)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
        for _ in range(options.runs):
            for side in options.sides:
                output = folder / side
                shutil.rmtree(output, ignore_errors=True)  # keep only one output of each side on the disk
                runs[side].append(run_side(side, base, adapter, output))
        best = {side: min(found, key=lambda run: run["wall"]) for side, found in runs.items()}
        for side, found in runs.items():
            best[side]["median_wall"] = round(statistics.median(run["wall"] for run in found), 3)
        result: dict[str, Any] = {"config": options.config.name, "base_mb": round(size / 1e6), "sides": best}
        for other in ("cp", "peft"):
            if {"ours", other} <= best.keys():
                result[f"to_{other}"] = {key: round(best["ours"][key] / best[other][key], 3) for key in best["ours"]}
        if {"ours", "peft"} <= best.keys():
            result["same_bits"] = is_bitwise_equal(folder / "ours", folder / "peft")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
