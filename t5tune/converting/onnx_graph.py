"""Write the encoder or the decoder of a T5, mT5 or umT5 as an ONNX graph, with weights in fp32 or uint8.

    write_graph(model, model.encoder, folder / "encoder_model.onnx", quantized=False)
    write_graph(model, model.decoder, folder / "decoder_model_merged.onnx", quantized=False)

transformers.js finds the files, the inputs and the outputs by their names, and takes 0 for each axis whose name isn't
`batch_size`. So the decoder gets an empty cache at first, and must need no branch: self-attention appends to its cache,
and cross-attention projects the encoder states that aren't cached yet: all of them at first, none later.

The weights go to the file one by one, since a Protocol Buffers message may be written in parts, which readers merge.

B batch, S source tokens, T target tokens, Q queries, K keys, H heads, D width, R distances between two tokens.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from t5tune.errors import ModelError

OPSET, IR_VERSION = 20, 9  # of onnx 1.15; onnxruntime reads both since 1.17
MAX_FILE_BYTES = (1 << 31) - (16 << 20)  # Protocol Buffers allow 2 GiB; the nodes need less than the rest
INTERNAL_BYTES = 1 << 10  # smaller tensors are never in the data file: onnxruntime infers shapes from some of them
DATA_SUFFIX = "_data"
ZERO_POINT = 128  # of uint8 weights; with int8 weights, CPUs without VNNI add products in 16 bits, which overflow
MASKED = -1e9
INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT
ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "relu": ("Relu", {}), "gelu_new": ("Gelu", {"approximate": "tanh"}),
}  # fmt: skip
BATCH, SOURCE, TARGET = "batch_size", "encoder_sequence_length", "decoder_sequence_length"


def write_graph(model: Any, stack: Any, file: Path, quantized: bool) -> None:
    """Write a stack of the model; the decoder with the head, and with the keys and values of earlier tokens.

    The encoder computes last_hidden_state (B, S, D) from input_ids and attention_mask (B, S). The decoder computes
    logits (B, T, V) and present.… (B, H, K, head width) from input_ids (B, T), encoder_hidden_states,
    encoder_attention_mask and past_key_values.….
    """
    is_decoder, width, heads = stack.is_decoder, model.config.d_model, (model.config.num_heads, model.config.d_kv)
    with _open_graph(model, [stack, model.lm_head] if is_decoder else [stack], file, quantized) as graph:
        ids = graph.declare("input_ids", INT64, TARGET if is_decoder else SOURCE)
        mask = graph.declare("encoder_attention_mask" if is_decoder else "attention_mask", INT64, SOURCE)
        padding = graph.mask_padding(mask)
        if not is_decoder:
            past = graph.store([0])
        else:
            states = graph.declare("encoder_hidden_states", FLOAT, SOURCE, width)
            past, known = (graph.measure(f"past_key_values.0.{side}.key", 2) for side in ("decoder", "encoder"))
            new_states = graph.add("Slice", states, known, graph.store([np.iinfo(np.int64).max]), graph.store([1]))
        hidden = graph.embed(ids, stack.embed_tokens.weight)
        distances = graph.measure_distances(past, graph.measure(ids, 1), stack.block[0].layer[0].SelfAttention)
        for number, block in enumerate(stack.block):
            for side, layer in zip(("decoder", "encoder"), block.layer[:-1], strict=False):
                is_cross = side == "encoder"
                attention = layer.EncDecAttention if is_cross else layer.SelfAttention
                if not is_cross and attention.has_relative_attention_bias:  # T5 has one, umT5 one in each block
                    table = graph.look_up_bias(attention, distances)
                    bias = table if is_decoder else graph.add("Add", table, padding)
                normed = graph.normalize(layer.layer_norm, hidden)
                keys, values = (
                    graph.project_heads(attention, part, new_states if is_cross else normed) for part in "kv"
                )
                if is_decoder:
                    keys, values = (
                        graph.append_to_cache(f"{number}.{side}.{kind}", new, heads, f"{side}_length")
                        for kind, new in (("key", keys), ("value", values))
                    )
                hidden = graph.attend(attention, hidden, normed, keys, values, padding if is_cross else bias)
            hidden = graph.feed_forward(block.layer[-1], hidden)
        scale = model.architecture.get_logit_scale(model) if is_decoder else 1.0
        hidden = graph.normalize(stack.final_layer_norm, hidden, scale)
        if is_decoder:
            graph.output("logits", graph.project(model.lm_head, hidden), TARGET, model.lm_head.out_features)
            graph.outputs.insert(0, graph.outputs.pop())  # as other exporters order them
        else:
            graph.output("last_hidden_state", hidden, SOURCE, width)


class _Graph:
    """The nodes of a graph, whose weights are in the file already. Methods return the names of tensors."""

    def __init__(self, stream: Any, data: Any, quantized: bool, activation: str) -> None:
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self._stream, self._data, self._quantized, self._activation = stream, data, quantized, activation
        self._num_names = 0
        self._rounded: dict[str, list[str]] = {}  # input of linear layers -> in uint8, its scale, its zero point

    def _make_name(self) -> str:
        self._num_names += 1
        return f"t{self._num_names}"

    def declare(self, name: str, dtype: int, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, (BATCH, *shape)))
        return name

    def output(self, name: str, tensor: str, *shape: int | str) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, FLOAT, (BATCH, *shape)))
        self.nodes.append(helper.make_node("Identity", [tensor], [name]))

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = self._make_name()
        self.nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def store(self, values: Any, dtype: type[np.generic] = np.int64) -> str:
        """Append a constant or a weight to the file."""
        array = np.ascontiguousarray(values, dtype)
        tensor = TensorProto(name=self._make_name(), dims=array.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        if self._data is None or array.nbytes < INTERNAL_BYTES:
            tensor.raw_data = array.tobytes()
        else:
            place = {"location": Path(self._data.name).name, "offset": self._data.tell(), "length": array.nbytes}
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self._data.write(array.data)
        self._stream.write(ModelProto(graph=GraphProto(initializer=[tensor])).SerializeToString())
        return str(tensor.name)

    def embed(self, ids: str, weight: torch.Tensor) -> str:
        if not self._quantized:
            return self.add("Gather", self.store(weight.numpy(), np.float32), ids)
        values, scale = _quantize(weight)
        rows = self.add("Cast", self.add("Gather", self.store(values, np.uint8), ids), to=FLOAT)
        rows = self.add("Sub", rows, self.store(ZERO_POINT, np.float32))
        return self.add("Mul", rows, self.add("Gather", self.store(scale[:, None], np.float32), ids))

    def project(self, linear: Any, hidden: str) -> str:
        """Apply a linear layer; `hidden` is rounded to 8 bits if the weights are."""
        if not self._quantized:
            return self.add("MatMul", hidden, self.store(linear.weight.numpy().T, np.float32))
        if hidden not in self._rounded:
            self._rounded[hidden] = [self._make_name() for _ in range(3)]
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [hidden], self._rounded[hidden]))
        (rounded, scale, zero), (values, scale_O) = self._rounded[hidden], _quantize(linear.weight)
        weight, weight_zero = self.store(values.T, np.uint8), self.store(ZERO_POINT, np.uint8)
        sums = self.add("Cast", self.add("MatMulInteger", rounded, weight, zero, weight_zero), to=FLOAT)
        return self.add("Mul", sums, self.add("Mul", scale, self.store(scale_O, np.float32)))

    def normalize(self, norm: Any, hidden: str, scale: float = 1.0) -> str:
        """Apply an RMSNorm, in the form that onnxruntime replaces with one operator."""
        mean = self.add("ReduceMean", self.add("Pow", hidden, self.store(2, np.float32)), self.store([-1]))
        root = self.add("Sqrt", self.add("Add", mean, self.store(norm.variance_epsilon, np.float32)))
        return self.add("Mul", self.add("Div", hidden, root), self.store(norm.weight.numpy() * scale, np.float32))

    def measure(self, tensor: str, axis: int) -> str:
        """Return the size of an axis, with shape [1]."""
        return self.add("Shape", tensor, start=axis, end=axis + 1)

    def mask_padding(self, mask: str) -> str:
        """Return the summand of the scores of each key: 0, or MASKED for padding; shape (B, 1, 1, S)."""
        is_padding = self.add("Cast", self.add("Sub", self.store(1), mask), to=FLOAT)
        return self.add("Unsqueeze", self.add("Mul", is_padding, self.store(MASKED, np.float32)), self.store([1, 2]))

    def measure_distances(self, past: str, new: str, attention: Any) -> str:
        """Return the rows of `look_up_bias`'s table, shape (Q, K), given the numbers of cached and of new tokens."""
        start, end = (self.add("Squeeze", each) for each in (past, self.add("Add", past, new)))
        queries, keys = (self.add("Range", each, end, self.store(1)) for each in (start, self.store(0)))
        distances = self.add("Sub", keys, self.add("Unsqueeze", queries, self.store([1])))
        least, most = (self.store(sign * attention.relative_attention_max_distance) for sign in (-1, 1))
        return self.add("Add", self.add("Clip", distances, least, most), most)

    def look_up_bias(self, attention: Any, distances: str) -> str:
        """Return the position bias, shape (H, Q, K); in the decoder, it also hides future tokens."""
        longest = attention.relative_attention_max_distance  # all longer distances have the same bias
        table_HR = attention.compute_bias(1, 2 * longest + 1, past_seen_tokens=longest)[0, :, 0].clone()
        if attention.is_decoder:
            table_HR[:, longest + 1 :] = MASKED
        return self.add("Transpose", self.add("Gather", self.store(table_HR.T, np.float32), distances), perm=[2, 0, 1])

    def append_to_cache(self, name: str, new: str, heads: tuple[int, int], length: str) -> str:
        shapes = ((heads[0], f"{prefix}_{length}", heads[1]) for prefix in ("past", "present"))
        joined = self.add("Concat", self.declare(f"past_key_values.{name}", FLOAT, *next(shapes)), new, axis=2)
        self.output(f"present.{name}", joined, *next(shapes))
        return joined

    def project_heads(self, attention: Any, part: str, hidden: str) -> str:
        """Project q, k or v: (B, S, D) -> (B, H, S, head width)."""
        shape = self.store([0, 0, attention.n_heads, attention.key_value_proj_dim])
        projected = self.add("Reshape", self.project(getattr(attention, part), hidden), shape)
        return self.add("Transpose", projected, perm=[0, 2, 1, 3])

    def attend(self, attention: Any, hidden: str, normed: str, keys: str, values: str, bias: str) -> str:
        queries = self.project_heads(attention, "q", normed)
        scores = self.add("MatMul", queries, self.add("Transpose", keys, perm=[0, 1, 3, 2]))
        weights = self.add("Softmax", self.add("Add", scores, bias), axis=-1)
        mixed = self.add("Transpose", self.add("MatMul", weights, values), perm=[0, 2, 1, 3])
        return self.add("Add", hidden, self.project(attention.o, self.add("Reshape", mixed, self.store([0, 0, -1]))))

    def feed_forward(self, layer: Any, hidden: str) -> str:
        linears, normed = layer.DenseReluDense, self.normalize(layer.layer_norm, hidden)
        is_gated = hasattr(linears, "wi_0")
        operator, attributes = ACTIVATIONS[self._activation]
        inner = self.add(operator, self.project(linears.wi_0 if is_gated else linears.wi, normed), **attributes)
        if is_gated:
            inner = self.add("Mul", inner, self.project(linears.wi_1, normed))
        return self.add("Add", hidden, self.project(linears.wo, inner))


@contextmanager
def _open_graph(model: Any, modules: list[Any], file: Path, quantized: bool) -> Iterator[_Graph]:
    """Yield an empty graph, which is written to `file` at the end; weights that don't fit there get a data file.

    Args:
        modules: have all weights of the graph.
    """
    if (activation := model.config.dense_act_fn) not in ACTIVATIONS:
        problem = f"to: onnx: a model with the activation {activation} can't be converted"
        raise ModelError(problem, hint="write a checkpoint, which transformers loads, with --to checkpoint")
    num_values = sum(parameter.numel() for module in modules for parameter in module.parameters())
    with ExitStack() as files:
        stream, data = files.enter_context(open(file, "wb")), None
        if num_values * (1 if quantized else 4) > MAX_FILE_BYTES:
            data = files.enter_context(open(f"{file}{DATA_SUFFIX}", "wb"))
        graph = _Graph(stream, data, quantized, activation)
        yield graph
        made = helper.make_graph(graph.nodes, file.stem, graph.inputs, graph.outputs)
        versions = {"opset_imports": [helper.make_opsetid("", OPSET)], "ir_version": IR_VERSION}
        stream.write(helper.make_model(made, producer_name="t5tune", **versions).SerializeToString())


def _quantize(weight_OI: torch.Tensor) -> tuple[Any, Any]:
    """Round each row to 8 bits, and return the values and the scales: the weight is (value - ZERO_POINT) * scale."""
    scale_O = weight_OI.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / (ZERO_POINT - 1)
    return (weight_OI / scale_O[:, None]).round_().add_(ZERO_POINT).to(torch.uint8).numpy(), scale_O.numpy()
