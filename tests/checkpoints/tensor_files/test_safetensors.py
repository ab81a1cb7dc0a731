"""Reading and writing weights without torch, compared bit by bit with torch and safetensors."""

import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import T5ForConditionalGeneration

from t5tune.checkpoints.base_tensors import Checkpoint
from t5tune.checkpoints.tensor_files.safetensors import SafetensorsFile, write_safetensors
from t5tune.checkpoints.tensor_files.tensors import Tensor, from_float32
from t5tune.checkpoints.tensor_files.torch_file import read_torch_file
from t5tune.errors import CheckpointError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


def torch_bytes(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def assert_same(read: Tensor, expected: torch.Tensor) -> None:
    """Compare dtype, shape and bits."""
    assert read.dtype == NAMES[expected.dtype]
    assert read.shape == tuple(expected.shape)
    assert read.tobytes() == torch_bytes(expected)


def assert_holds(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    checkpoint = Checkpoint(folder)
    assert sorted(checkpoint.list_names()) == sorted(expected)
    for name, value in expected.items():
        assert_same(checkpoint.get_tensor(name), value)


def raw_safetensors(header: Any, data: bytes) -> bytes:
    """Build a file with this header, valid or not."""
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "f32": torch.randn(3, 5),
        "bf16": torch.randn(7, 2).to(torch.bfloat16),
        "f16": torch.randn(4).to(torch.float16),
        "i64": torch.tensor([[-(2**62), 7], [0, 2**62]]),
        "u8": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
    }


# safetensors


def test_a_file_that_safetensors_saved_reads_bit_by_bit(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"}
    assert set(file.entries) == set(tensors)
    for name, value in tensors.items():
        assert_same(file.get_tensor(name), value)


def test_tensors_at_unaligned_offsets_are_read_correctly(tmp_path: Path) -> None:
    floats = np.array([1.5, -2.25], np.float32)
    header = {"a": entry("I8", [3], 0, 3), "b": entry("F32", [2], 3, 11), "c": entry("I64", [1], 11, 19)}
    data = bytes([1, 2, 255]) + floats.tobytes() + struct.pack("<q", -5)
    (tmp_path / "odd.safetensors").write_bytes(raw_safetensors(header, data))
    file = SafetensorsFile(tmp_path / "odd.safetensors")
    assert file.get_tensor("a").array.tolist() == [1, 2, -1]
    assert file.get_tensor("b").array.tolist() == [1.5, -2.25]
    assert file.get_tensor("c").array.tolist() == [-5]


F32 = entry("F32", [2], 0, 8)
MANY_KEYS = b"{" + b"".join(b'"%d":1,' % number for number in range(1_000_000)) + b'"999999":1}'
INVALID_ENTRIES: dict[str, tuple[Any, int, str]] = {
    "truncated": (F32, 7, "data_offsets ends at byte 8, but the file has 7 bytes of data"),
    "shape too large": ({**F32, "shape": [3]}, 8, "data_offsets has 8 bytes, but dtype F32 and shape [3] need 12"),
    "scalar of 8 bytes": ({**F32, "shape": []}, 8, "data_offsets has 8 bytes, but dtype F32 and shape [] need 4"),
    "negative shape": (entry("F32", [-2], 0, -8), 0, "shape isn't a list of non-negative integers"),
    "two negative dimensions": ({**F32, "shape": [-2, -1]}, 8, "shape isn't a list of non-negative integers"),
    "shape of a boolean": (entry("F32", [True], 0, 4), 4, "shape isn't a list of non-negative integers"),
    "shape isn't a list": ({**F32, "shape": 2}, 8, "shape isn't a list of non-negative integers"),
    "many dimensions": ({**F32, "shape": [1] * 17}, 8, "shape has 17 dimensions; at most 16 are allowed"),
    "huge dimension": ({**F32, "shape": [0, 1 << 48]}, 8, "shape has a dimension of 281474976710656 or more"),
    "unknown dtype": ({**F32, "dtype": "F99"}, 8, "dtype F99 is unknown; expected one of F64, F32, F16, BF16, "),
    "dtype isn't text": ({**F32, "dtype": ["F32"]}, 8, "dtype ['F32'] is unknown; expected one of F64, "),
    "no dtype": ({"shape": [2], "data_offsets": [0, 8]}, 8, "dtype is missing"),
    "no offsets": ({"dtype": "F32", "shape": [2]}, 8, "data_offsets is missing"),
    "one offset": ({**F32, "data_offsets": [8]}, 8, "data_offsets isn't a list of two ascending non-negative integers"),
    "reversed offsets": (
        entry("F32", [2], 8, 0),
        8,
        "data_offsets isn't a list of two ascending non-negative integers",
    ),
    "negative offset": (
        entry("F32", [2], -8, 0),
        8,
        "data_offsets isn't a list of two ascending non-negative integers",
    ),
    "offsets are fractions": ({**F32, "data_offsets": [0.0, 8.0]}, 8, "data_offsets isn't a list of two ascending"),
    "entry is null": (None, 0, "expected an object with dtype, shape, data_offsets"),
}


@pytest.mark.parametrize(("value", "size", "message"), INVALID_ENTRIES.values(), ids=INVALID_ENTRIES)
def test_an_invalid_entry_is_refused_by_its_name(tmp_path: Path, value: Any, size: int, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw_safetensors({"w": value}, b"\0" * size))
    with pytest.raises(CheckpointError) as refused:
        SafetensorsFile(path)
    assert refused.value.message.startswith(f"{path}: w: {message}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(raw_safetensors({"w": F32}, b"\0" * 9), id="trailing byte"),
        pytest.param(raw_safetensors({"w": F32, "__metadata__": {"a": 1}}, b"\0" * 8), id="metadata of numbers"),
        pytest.param(raw_safetensors({"v": F32, "w": entry("F32", [2], 4, 12)}, b"\0" * 12), id="overlap"),
        pytest.param(raw_safetensors({"v": F32, "w": F32}, b"\0" * 8), id="same range"),
        pytest.param(raw_safetensors({"v": F32, "w": entry("F32", [1], 12, 16)}, b"\0" * 16), id="gap"),
        pytest.param(raw_safetensors({"w": entry("F32", [2], 4, 12)}, b"\0" * 12), id="gap at the beginning"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\0\0\0", id="shorter than a length"),
        pytest.param(struct.pack("<Q", 10) + b"{}", id="header longer than the file"),
        pytest.param(struct.pack("<Q", 1 << 63) + b"{}", id="header of 2^63 bytes"),
        pytest.param(struct.pack("<Q", 4) + b"{nop", id="not JSON"),
        pytest.param(struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", id="not UTF-8"),
        pytest.param(struct.pack("<Q", 2) + b"[]", id="header is a list"),
        pytest.param(struct.pack("<Q", 4) + b"null", id="header is null"),
        pytest.param(struct.pack("<Q", 200_000) + b"[" * 200_000, id="endlessly nested"),
        pytest.param(struct.pack("<Q", 100_000) + b'{"a": '.ljust(99_999, b"9") + b"}", id="endless number"),
        pytest.param(struct.pack("<Q", 32 << 20) + b"{".ljust((32 << 20) - 1) + b"}", id="header of 32 MiB"),
        pytest.param(struct.pack("<Q", 16) + b'{"w": 1, "w": 1}', id="duplicate key"),
        # must be found in linear time
        pytest.param(struct.pack("<Q", len(MANY_KEYS)) + MANY_KEYS, id="duplicate key among many"),
    ],
)
def test_an_invalid_file_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        SafetensorsFile(path)


def test_a_truncated_safetensors_file_is_refused_at_every_length(tmp_path: Path) -> None:
    save_file({"w": torch.arange(4.0), "v": torch.ones(2)}, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            SafetensorsFile(path)


def test_safetensors_reads_a_written_file_with_stable_bytes(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "source.safetensors")
    source = SafetensorsFile(tmp_path / "source.safetensors")
    state = {name: source.get_tensor(name) for name in source.entries}
    write_safetensors(tmp_path / "a.safetensors", state, {"format": "pt"})
    write_safetensors(tmp_path / "b.safetensors", dict(reversed(state.items())), {"format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    back = load_file(tmp_path / "a.safetensors")
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert torch_bytes(back[name]) == torch_bytes(value)


# checkpoints of one and of several files


@pytest.fixture
def model(untied_base: Path) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration.from_pretrained(untied_base)


def test_a_sharded_base_has_the_tensors_of_the_single_file(
    tmp_path: Path, model: T5ForConditionalGeneration, untied_base: Path
) -> None:
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_holds(tmp_path, load_file(untied_base / "model.safetensors"))


def test_a_bin_base_has_the_tensors_that_torch_load_reads(tmp_path: Path, model: T5ForConditionalGeneration) -> None:
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # embed_tokens and shared share a storage
    assert_holds(tmp_path, torch.load(tmp_path / "pytorch_model.bin", weights_only=True))


def test_a_sharded_bin_base_has_the_tensors_of_its_files(tmp_path: Path) -> None:
    parts = [{"a": torch.randn(3)}, {"b": torch.randn(2, 2).bfloat16()}]
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, tmp_path / file)
    index = {"metadata": {}, "weight_map": {"a": files[0], "b": files[1]}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_holds(tmp_path, parts[0] | parts[1])


def test_views_of_a_shared_storage_equal_torch_load(tmp_path: Path) -> None:
    whole = torch.randn(6, 8)
    state = {"whole": whole, "again": whole, "transposed": whole.t(), "rows": whole[2:4], "columns": whole[:, 1::3]}
    state |= {"expanded": torch.ones(1, 3).expand(4, 3), "scalar": whole[1, 1]}
    state |= {"empty": whole[:0], "empty at the end": whole[6:]}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_holds(tmp_path, torch.load(tmp_path / "pytorch_model.bin", weights_only=True))


def test_an_index_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    weight_map = {"w": "x.safetensors", "lost": "x.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="lost"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"base_model_name_or_path": "google/flan-t5-xl"}, "give its base instead: google/flan-t5-xl"),
        ({}, "give the base that the adapter was trained on"),
        ({"base_model_name_or_path": 3}, "give the base that the adapter was trained on"),
    ],
)
def test_an_adapter_given_as_a_base_is_refused(tmp_path: Path, config: dict[str, Any], hint: str) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "lora_alpha": 16, **config}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as refused:
        Checkpoint(tmp_path)
    assert refused.value.message == f"{tmp_path}: is an adapter, not a base"
    assert refused.value.hint == hint


def test_an_index_next_to_a_single_file_is_ignored(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).get_tensor("w").array.tolist() == [1, 1]


def test_the_weights_decide_whether_the_head_is_tied(
    tmp_path: Path, tied_base: Path, untied_base: Path, model: T5ForConditionalGeneration
) -> None:
    assert Checkpoint(tied_base).is_tied()
    assert not Checkpoint(untied_base).is_tied()
    state = model.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert not Checkpoint(tmp_path).is_tied()
    state["lm_head.weight"] = state["shared.weight"]  # old torch files store a tied head this way
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert Checkpoint(tmp_path).is_tied()


# rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_random_bits_is_the_same_as_in_torch(dtype: torch.dtype) -> None:
    bits = np.random.default_rng(3).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    halfway = bits & 0xFFFF0000 | 0x8000
    edges = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 1, 0xFFFF], np.uint32)
    nans = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0xFF800001], np.uint32)
    values = np.concatenate([bits, halfway, halfway - 1, halfway + 1, edges, nans]).view(np.float32)
    if dtype == torch.float16:
        values = values[np.isnan(values) | (np.abs(values) < 65504)]
    rounded = from_float32(values, NAMES[dtype]).array.view(np.uint16)
    expected = torch.from_numpy(values).to(dtype).view(torch.uint16).numpy()
    is_nan = np.isnan(values)
    assert np.array_equal(rounded[~is_nan], expected[~is_nan])
    back = torch.from_numpy(rounded[is_nan]).view(dtype)
    assert back.isnan().all()


@given(st.integers(0, (1 << 16) - 1))
def test_bf16_survives_conversion_to_fp32_and_back(bits: int) -> None:
    tensor = Tensor("BF16", np.array([bits], np.uint16))
    values = tensor.to_float32()
    assert np.isnan(values).all() or from_float32(values, "BF16").array.tolist() == [bits]


# torch files


def test_nested_containers_are_read_as_by_torch_load(tmp_path: Path) -> None:
    saved = {
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "nested": [{"bf16": torch.randn(5).bfloat16()}, (torch.tensor([True, False]), None, "text", 1.5)],
        "ordered": OrderedDict(i64=torch.arange(4), i32=torch.arange(4, dtype=torch.int32)),
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "f64": torch.randn(2, dtype=torch.float64),
        "f16": torch.randn(2).half(),
        7: torch.tensor([], dtype=torch.uint8),
    }
    torch.save(saved, tmp_path / "x.pt")
    read = read_torch_file(tmp_path / "x.pt")
    expected = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(read) == list(expected)
    for key in ("parameter", "f64", "f16", 7):
        assert_same(read[key], expected[key])
    for key in ("i64", "i32"):
        assert_same(read["ordered"][key], expected["ordered"][key])
    assert_same(read["nested"][0]["bf16"], expected["nested"][0]["bf16"])
    assert_same(read["nested"][1][0], expected["nested"][1][0])
    assert read["nested"][1][1:] == expected["nested"][1][1:]
    assert tuple(read["shape"]) == (2, 3)
    assert read["dtype"] == "BF16"


class _Call:
    """Pickles as a function call, which an unsafe reader executes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "pytorch_model.bin"
    pickled = pickle.dumps({"w": _Call(eval, f"open({str(marker)!r}, 'w').close()")}, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: its pickle refers to \S+\.eval"):
        read_torch_file(path)
    with pytest.raises(CheckpointError, match="eval"):
        Checkpoint(tmp_path)
    assert not marker.exists()
    pickle.loads(pickled)  # does run it
    assert marker.exists()


def test_a_legacy_torch_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin") as caught:
        read_torch_file(path)
    assert "safetensors" in (caught.value.hint or "")


def test_a_truncated_torch_file_is_refused_at_every_length(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(4.0)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            read_torch_file(path)


def test_all_tensors_of_a_file_share_one_map(tmp_path: Path) -> None:
    """A map keeps its file open and its pages count as memory, which adds up for an adapter of many large tensors."""
    path = tmp_path / "x.safetensors"
    values = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    write_safetensors(path, {name: Tensor("F32", values) for name in "abc"})
    file = SafetensorsFile(path)
    kept = [file.get_tensor(name) for name in file.entries]
    assert all(np.array_equal(tensor.to_float32(), values) for tensor in kept)
    maps = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    assert len(maps) == 1
    assert int(maps[0].split("Rss:")[1].split()[0]) < 1024  # KiB, of 12,288
    del kept
    assert str(path) not in Path("/proc/self/maps").read_text()
