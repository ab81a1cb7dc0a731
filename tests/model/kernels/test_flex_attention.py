"""Attention over packed rows by FlexAttention has the outputs and gradients of the loop over segments.

torch compiles kernels with gradients for GPUs only. Here the same function runs uncompiled, by FlexAttention's own
dense formulas, or compiled without generating kernels.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask
from transformers import T5Config, UMT5Config
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from t5tune.data.tokens.encoding import PreferencePair
from t5tune.model.attention.packing import use_packing
from t5tune.model.attention.segments import Segments, segment_attention
from t5tune.model.attention.t5 import _compute_bias
from t5tune.model.batches import PackedCollator
from t5tune.model.kernels import flex_attention
from t5tune.model.kernels.flex_attention import BLOCK, MAX_COMPILATIONS, MIN_LENGTH, Blocks, attend, divide_rows
from t5tune.model.kernels.fused import use_fused_layers
from tests.model.attention.test_packing import compute_packed_loss, make_examples, make_random_model
from tests.support.models.checkpointing import enable_checkpointing
from tests.support.models.gradients import assert_same_gradients, compute_gradients, compute_relative_error

if not hasattr(torch_flex, "AuxRequest"):
    pytest.skip("attention in one kernel needs torch 2.9 or newer", allow_module_level=True)

# torch itself hides it, but can't where warnings are errors
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")]
H, D = 4, 16
SOURCES, TARGETS = (150, 7, 61, 1, 200), (40, 3, 90, 12, 1)
LENGTHS = {"encoder": (SOURCES, SOURCES), "decoder": (TARGETS, TARGETS), "cross": (TARGETS, SOURCES)}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


REAL_GET_KERNEL = flex_attention._get_kernel


def compile_with(backend: Any) -> Callable[..., Any]:
    return cache(
        lambda *options: torch.compile(flex_attention._Kernel(*options), dynamic=True, fullgraph=True, backend=backend)
    )


compile_kernel = compile_with("aot_eager")


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch.compile make the graphs that it makes for a GPU, but compute them by torch's own dense formulas."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_get_kernel", compile_kernel)
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILATIONS):
        yield


def record_compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that receives each graph that torch.compile makes of a kernel from here on."""
    compiled: list[Any] = []

    def record(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(flex_attention, "_get_kernel", compile_with(record))
    torch._dynamo.reset()
    return compiled


def make_attention(model_type: str, kind: str, dtype: torch.dtype) -> Any:
    """Make an attention layer with position bias; None for cross-attention."""
    if kind == "cross":
        return None
    torch.manual_seed(1)
    shape = {"d_model": H * D, "d_kv": D, "num_heads": H, "is_decoder": kind == "decoder"}
    attention, config = (UMT5Attention, UMT5Config) if model_type == "umt5" else (T5Attention, T5Config)
    layer = attention(config(**shape), has_relative_attention_bias=True)
    with torch.no_grad():
        layer.relative_attention_bias.weight.normal_()
    return layer.to(dtype)


def make_states(kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Make queries, keys and values as they come from split heads."""
    torch.manual_seed(0)
    queries, keys = LENGTHS[kind]
    shapes = [(1, sum(lengths), H, D) for lengths in (queries, keys, keys)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def attend_in_one_kernel(
    kind: str, states: list[torch.Tensor], table_HR: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    rows = divide_rows(SOURCES, TARGETS)
    blocks = rows.blocks[kind]
    lengths = [len(blocks.query_segments), len(blocks.key_segments), len(blocks.key_segments)]
    padded = [
        torch.nn.functional.pad(states_BLHD, (0, 0, 0, 0, 0, length - states_BLHD.shape[1])).transpose(1, 2)
        for states_BLHD, length in zip(states, lengths, strict=True)
    ]
    attended_BQHD = attend(*padded, blocks, table_HR, kind == "decoder", dropout)
    return attended_BQHD[:, : states[0].shape[1]]


def compute_with_gradients(
    attend: Callable[[list[torch.Tensor]], torch.Tensor], states: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    leaves = [state.clone().requires_grad_() for state in states]
    output = attend(leaves)
    torch.manual_seed(7)
    (output * torch.randn(output.shape, dtype=output.dtype)).sum().backward()
    gradients = {name: leaf.grad for name, leaf in zip(("query", "key", "value"), leaves, strict=True)}
    assert all(gradient is not None for gradient in gradients.values())
    return {"output": output.detach(), **gradients}  # type: ignore[dict-item]


def assert_equal_within(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        assert float((found[name] - value).abs().max() / value.abs().max()) < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("model_type", ["t5", "umt5"])
@pytest.mark.variants(
    "t5-encoder-torch.float64", "t5-decoder-torch.float32", "t5-cross-torch.float64", "umt5-encoder-torch.float64"
)
def test_kernel_and_loop_attend_alike(model_type: str, kind: str, dtype: torch.dtype) -> None:
    layer, states = make_attention(model_type, kind, dtype), make_states(kind, dtype)
    queries, keys = map(list, LENGTHS[kind])
    rows = divide_rows(SOURCES, TARGETS)
    bias = None if layer is None else _compute_bias(layer, Segments(SOURCES, TARGETS))
    table = None if layer is None else _compute_bias(layer, Segments(SOURCES, TARGETS, rows)).detach()

    def loop(states: list[torch.Tensor]) -> torch.Tensor:
        return segment_attention(*(state.transpose(1, 2) for state in states), queries, keys, bias, 0.0)

    found = compute_with_gradients(lambda states: attend_in_one_kernel(kind, states, table, 0.0), states)
    assert_equal_within(found, compute_with_gradients(loop, states), TOLERANCES[dtype])
    assert table is None or table.shape == (H, 257)


def hash_in_numpy(seed_H: np.ndarray, length: int, width: int) -> np.ndarray:
    """Compute the hash in unsigned arithmetic, as its author defines it."""
    query, key = np.arange(length, dtype=np.uint32)[:, None], np.arange(width, dtype=np.uint32)
    x = seed_H.view(np.uint32)[:, None, None] + query * np.uint32(0x9E3779B1) + key * np.uint32(0x85EBCA77)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return (x ^ (x >> np.uint32(16))) & np.uint32(0xFFFFFF)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.variants("encoder-torch.float32")
def test_dropout_applies_to_the_probabilities(kind: str, dtype: torch.dtype) -> None:
    """Segments of a single token are among them: with dropout, some of their queries see no key."""
    dropout = 0.3
    layer, states = make_attention("t5", kind, dtype), make_states(kind, dtype)
    queries, keys = LENGTHS[kind]
    rows = divide_rows(SOURCES, TARGETS)
    table = None if layer is None else _compute_bias(layer, Segments(SOURCES, TARGETS, rows)).detach()
    torch.manual_seed(11)
    seed_H = torch.randint(-(2**31), 2**31 - 1, (H,), dtype=torch.int32).numpy()

    def dense(states: list[torch.Tensor]) -> torch.Tensor:
        query, key, value = (state.transpose(1, 2) for state in states)
        scores = query @ key.mT
        distance = torch.arange(sum(keys)) - torch.arange(sum(queries))[:, None]
        if table is not None:
            scores = scores + table[:, distance.clamp(-128, 128) + 128]
        numbers = [np.repeat(np.arange(len(lengths)), lengths) for lengths in (queries, keys)]
        is_seen = torch.from_numpy(numbers[0][:, None] == numbers[1])
        if kind == "decoder":
            is_seen &= distance <= 0
        probabilities = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
        is_kept = hash_in_numpy(seed_H, sum(queries), sum(keys)) < round((1 - dropout) * 2**24)
        return (probabilities * torch.from_numpy(is_kept) / (1 - dropout) @ value).transpose(1, 2)

    def by_kernel(states: list[torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(11)
        return attend_in_one_kernel(kind, states, table, dropout)

    expected = compute_with_gradients(dense, states)
    # torch.compile takes the sum of a query's scores for fp32, as it is on GPUs
    assert_equal_within(compute_with_gradients(by_kernel, states), expected, max(1e-7, TOLERANCES[dtype]))
    assert (expected["output"] == 0).all(-1).any()  # a query that sees no key


def test_the_hash_keeps_the_expected_share_for_each_seed() -> None:
    query, key = torch.arange(600)[:, None], torch.arange(700)
    seeds = torch.randint(-(2**31), 2**31 - 1, (8,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    kept = torch.stack([flex_attention.compute_hash(seed, query, key) < round(0.9 * 2**24) for seed in seeds]).double()
    deviation = (0.9 * 0.1 / kept[0].numel()) ** 0.5
    assert (kept.mean((1, 2)) - 0.9).abs().max() < 4 * deviation
    # rows, columns, neighbors and other heads are independent
    centered = kept - 0.9
    for other in (
        centered.roll(1, 0), centered.roll(1, 1), centered.roll(1, 2), centered.roll((1, 1), (1, 2)),
        centered.roll((1, -1), (1, 2)),
    ):  # fmt: skip
        assert float((centered * other).mean() / 0.09) < 4 / kept.numel() ** 0.5
    assert (kept.mean(1) - 0.9).abs().max() < 5.5 * (0.09 / 600) ** 0.5


segment_lengths = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 300)), min_size=1, max_size=24)


@settings(max_examples=12, deadline=None)
@example([(256, 3)])  # sources fill whole blocks, and targets don't
@example([(1, 1)])
@example([(128, 256), (128, 1)])
@example([(1, 1)] * 200 + [(1, 2), (2, 1)] * 50)  # more segments than uint8 counts
@given(segment_lengths)
def test_blocks_are_those_of_create_block_mask(pairs: list[tuple[int, int]]) -> None:
    sources, targets = (tuple(side) for side in zip(*pairs, strict=True))
    rows = divide_rows(sources, targets)
    for row, used in ((rows.source_length, sources), (rows.target_length, targets)):
        assert row % BLOCK == 0
        assert row >= MIN_LENGTH
        assert 0 <= row - sum(used) <= max(BLOCK, MIN_LENGTH - sum(used))
    for kind in LENGTHS:
        blocks = rows.blocks[kind]

        def see(_batch: Any, _head: Any, query: Any, key: Any, kind: str = kind, blocks: Blocks = blocks) -> Any:
            is_same = blocks.query_segments[query] == blocks.key_segments[key]
            return is_same & (query >= key) if kind == "decoder" else is_same

        size = len(blocks.query_segments), len(blocks.key_segments)
        stock = create_block_mask(see, None, None, *size, device="cpu", BLOCK_SIZE=BLOCK)
        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices",
                 "full_q_num_blocks", "full_q_indices")  # fmt: skip
        for name, found in zip(names, blocks.tensors, strict=True):
            expected = getattr(stock, name)
            assert found.dtype == expected.dtype, name
            assert torch.equal(found, expected), (kind, name)
            assert found.storage_offset() % 4 == 0, name  # or compiled kernels would copy it
        numbers = {"encoder": (sources, sources), "decoder": (targets, targets), "cross": (targets, sources)}[kind]
        for found, lengths in zip((blocks.query_segments, blocks.key_segments), numbers, strict=True):
            padding = len(found) - sum(lengths)
            assert found.tolist() == np.repeat(np.arange(len(lengths) + 1), [*lengths, padding]).tolist()
        # each query sees a key, or its sum would be 0
        is_seen = blocks.query_segments[:, None] == blocks.key_segments
        assert is_seen.any(1).all()


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_rows_of_the_loops_bias_are_aligned(kind: str) -> None:
    """Otherwise torch's memory-efficient kernel copies the bias for each segment."""
    bias_1HQK = _compute_bias(make_attention("t5", kind, torch.float32), Segments((5, 13), (13, 2)))
    assert bias_1HQK.shape[2:] == (13, 13)
    assert bias_1HQK.stride(3) == 1
    assert all(stride % 8 == 0 for stride in bias_1HQK.stride()[1:3])


@pytest.mark.parametrize("has_pairs", [False, True])
@pytest.mark.parametrize("kind", ["t5", "flan-t5", "mt5", "umt5"])
@pytest.mark.variants("flan-t5-True")
def test_kernel_and_loop_give_the_same_gradients(kind: str, has_pairs: bool) -> None:
    model = make_random_model(kind, torch.float64)
    model.get_encoder().block[0].layer[0].SelfAttention.relative_attention_bias.weight.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("relative_attention_bias" not in name)
    use_packing(model)
    use_fused_layers(model)
    examples = make_examples()
    if has_pairs:  # both targets of a pair attend to its source
        others = make_examples([(1, length) for length in (70, 2, 31, 1, 140, 5)])
        pairs = zip(examples, others, strict=True)
        examples = [PreferencePair(one.source_S, one.target_T, other.target_T) for one, other in pairs]
    loss, logits = compute_packed_loss(model, examples)
    expected = compute_gradients(model, loss)
    found_loss, found_logits = compute_packed_loss(model, examples, divides_rows=True)
    assert compute_relative_error(found_logits.detach(), logits.detach()) < 1e-10
    assert_same_gradients(compute_gradients(model, found_loss), expected, 1e-9)


@pytest.mark.long
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_dropout(reentrant: bool) -> None:
    examples, found = make_examples(), []
    for checkpoints in (False, True):
        model = make_random_model("flan-t5", torch.float64, dropout=0.3)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("relative_attention_bias" not in name)
        use_packing(model)
        if checkpoints:
            model.enable_input_require_grads()
            enable_checkpointing(model, reentrant)
        torch.manual_seed(2)
        found.append(compute_gradients(model, compute_packed_loss(model, examples, divides_rows=True)[0]))
    assert_same_gradients(found[1], found[0], 1e-10)


def test_padding_to_whole_blocks_counts_for_nothing() -> None:
    examples = make_examples()
    packed, filled = PackedCollator(9, 0)(examples), PackedCollator(9, 7, divides_rows=True)(examples)
    for name, padding in (("input_ids", 7), ("decoder_input_ids", 7), ("labels", -100)):
        length = packed[name].shape[1]
        assert torch.equal(filled[name][:, :length], packed[name])
        assert filled[name].shape[1] % BLOCK == 0
        assert (filled[name][:, length:] == padding).all()
    assert filled["packing"].rows is not None
    assert replace(filled["packing"], rows=None) == packed["packing"]


def test_the_kernel_is_compiled_with_these_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda kernel, **options: given.update(options))
    with torch._dynamo.config.patch(recompile_limit=8):
        REAL_GET_KERNEL.__wrapped__(False, 128, 2**24, None)
        assert torch._dynamo.config.recompile_limit == MAX_COMPILATIONS
    assert given == {"dynamic": True, "fullgraph": True}
