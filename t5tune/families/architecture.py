"""What t5tune must know about an architecture of transformers, such as T5's.

    architecture = find_family(config, folder).bind(config)
    architecture.head_weight, architecture.start_token_id

Each architecture is a class in a separate module. Tensors have the names of transformers' modules, as in PEFT's
adapters; `to_model_name` converts the names in a checkpoint's files. Nothing here imports torch: functions call only
methods of the tensors that they get.

CONTRIBUTING.md says how to add an architecture.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from t5tune.errors import CheckpointError
from t5tune.formatting import shorten

Shapes = dict[str, tuple[int, ...]]
MAX_LAYERS = 1 << 12
WEIGHT_KINDS = ("embedding", "head", "attention", "feed-forward", "rest")


@dataclass(frozen=True)
class Dimensions:
    """Sizes on which the memory of an evaluation depends.

    Args:
        num_rows: rows of the embedding.
        num_heads: attention heads of an encoder layer.
        cache_width: keys of a token in a decoder layer's cache, which has the same number of values.
    """

    num_rows: int
    num_heads: int
    num_decoder_layers: int
    cache_width: int


class Architecture(ABC):
    """An architecture with the sizes of one config.json.

    Attributes:
        default_config: values that a config.json may leave out, such as the ids of special tokens.
        feed_forward_key: the key of config.json that names the activation of feed-forward layers.
        head: path of the output layer.
        tied_to: the weight that a tied head shares.
        always_shared: parameter -> the parameter that it shares, whether or not the head is tied. Only some files
            contain both.
        token_row_modules: paths of the embeddings of encoder and decoder, if rows of them can be trained.
        block_classes: ends of the names of transformers' classes for a layer of the encoder or decoder.
        encoder_module: path of the modules that generation runs only once.
        skipped_modules: paths of modules that text doesn't need: they aren't loaded, and `merge` copies their tensors.
        ignored_tensors: tensors in some files that no implementation uses.
        attention_implementation: transformers' attn_implementation for padded batches.
        accepts_4d_masks: whether a padding mask can have the shape (B, 1, 1, S). Models with windows build their masks
            from a mask of shape (B, S).
        has_flex_attention: whether all attention over packed rows can be computed in one kernel per layer.
        linear_layers: the names that `lora_target_modules` can contain, with the linear layers of each.
        fp16_overflow_layer: a linear layer whose output exceeds the range of fp16, so transformers keeps its weight in
            fp32.
        trainable_modules: other modules, which `modules_to_save` can contain.
        writes_model_names: whether written files have the model's names of tensors, and not the base's.
    """

    model_type: ClassVar[str]
    default_config: ClassVar[Mapping[str, Any]] = {}
    feed_forward_key: ClassVar[str | None] = None
    head: ClassVar[str]
    tied_to: ClassVar[str]
    always_shared: ClassVar[Mapping[str, str]] = {}
    token_row_modules: ClassVar[tuple[str, ...]] = ()
    block_classes: ClassVar[tuple[str, ...]]
    encoder_module: ClassVar[str]
    skipped_modules: ClassVar[tuple[str, ...]] = ()
    ignored_tensors: ClassVar[frozenset[str]] = frozenset()
    attention_implementation: ClassVar[str] = "sdpa"
    accepts_4d_masks: ClassVar[bool] = True
    has_flex_attention: ClassVar[bool] = False
    linear_layers: ClassVar[Mapping[str, tuple[str, ...]]]
    fp16_overflow_layer: ClassVar[str | None] = None
    trainable_modules: ClassVar[tuple[str, ...]]
    writes_model_names: ClassVar[bool] = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Bind the architecture to a config.json that `Family.complete_config` has completed."""
        self.config = config

    @property
    def head_weight(self) -> str:
        return f"{self.head}.weight"

    @property
    def is_tied(self) -> bool:
        """Whether config.json says that the head is tied; the files may say something else."""
        return bool(self.config.get("tie_word_embeddings", True))

    def list_shared(self, tied: bool) -> dict[str, str]:
        """Map each parameter that shares its values to the parameter that it shares."""
        return {**self.always_shared, **({self.head_weight: self.tied_to} if tied else {})}

    def to_model_name(self, file_name: str) -> str:
        """Convert the name of a tensor in a checkpoint's files to its name in the model."""
        return file_name

    def is_skipped(self, name: str) -> bool:
        """Whether a tensor belongs to a module that isn't loaded."""
        return name.startswith(tuple(f"{module}." for module in self.skipped_modules))

    def is_dropped(self, name: str) -> bool:
        """Whether a tensor of the files isn't in the model, and not in a checkpoint that is made from them, either."""
        return False

    def list_initial_shapes(self) -> Shapes:
        """Return the shapes of weights that start at zero if the files lack them, by name."""
        return {}

    def expand_target_modules(self, names: list[str]) -> list[str]:
        """Replace names of groups with their linear layers, each once: attention -> q, k, v, o."""
        expanded = (self.linear_layers.get(name.replace("_", "-"), (name,)) for name in names)
        return list(dict.fromkeys(layer for layers in expanded for layer in layers))

    def restrict_target_modules(self, layers: list[str]) -> list[str] | str:
        """Return PEFT's target_modules for these linear layers: a list of names, or a regular expression."""
        return layers

    @classmethod
    def set_tied(cls, config: dict[str, Any], tied: bool) -> None:
        """Write into a config.json whether the head is tied."""
        config["tie_word_embeddings"] = tied

    @property
    @abstractmethod
    def start_token_id(self) -> int:
        """The token that the decoder starts with, from config.json. The tokenizer has the other special tokens."""

    @property
    @abstractmethod
    def dimensions(self) -> Dimensions: ...

    @property
    def logit_cap(self) -> float | None:
        """The final soft cap: logits are cap · tanh(logits / cap). None: not capped."""
        return None

    @abstractmethod
    def derive_shapes(self) -> Shapes:
        """Derive the shapes of all weights that are loaded, by name; linear layers are [out, in].

        Raises:
            CheckpointError: config.json lacks a size.
        """

    @abstractmethod
    def is_quantizable(self, name: str, quantize_wo: bool) -> bool:
        """Whether q_lora quantizes a linear layer of this name: all in blocks, but `wo` only with quantize_wo.

        `wo` also means the output projection of feed-forward layers that have different names.
        """

    @abstractmethod
    def classify(self, name: str) -> str:
        """Return the kind of a weight, one of WEIGHT_KINDS."""

    @abstractmethod
    def make_encoder_inputs(self, input_ids: Any, attention_mask: Any, packing: Any) -> dict[str, Any]:
        """Make the arguments of the encoder. See `compute_hidden_states`."""

    @abstractmethod
    def compute_hidden_states(
        self, model: Any, input_ids: Any, decoder_input_ids: Any, attention_mask: Any = None, packing: Any = None
    ) -> Any:
        """Compute the head's input: the decoder's output, shape (B, T, D).

        Args:
            attention_mask: of a padded batch (B, S); None without padding.
            decoder_input_ids: of a padded batch (B, T), or (n·B, T) if each source has n targets, which follow each
                other.
            packing: model.attention.Segments of a packed batch; None: the batch is padded.
        """

    def read_size(self, config: Mapping[str, Any], key: str, limit: int = 1 << 32) -> int:
        """Read a size from (a part of) config.json, or raise a CheckpointError."""
        value = config.get(key)
        if type(value) is not int or not 0 < value < limit:
            problem = f"the base's config.json: {key}: {shorten(str(value))}: expected a positive integer below {limit}"
            raise CheckpointError(problem, hint="correct config.json, or choose the family of its model type")
        return value

    def read_id(self, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
        """Read the id of a token from (a part of) config.json, or raise a CheckpointError."""
        value = default if config.get(key) is None else config[key]
        rows = self.dimensions.num_rows
        if type(value) is not int or not 0 <= value < rows:
            problem = f"the base's config.json: {key}: {shorten(str(value))}"
            raise CheckpointError(f"{problem}: expected the id of a token, below {rows:,}")
        return value


def repeat_for_targets(values: Any, decoder_input_ids: Any) -> Any:
    """Repeat the values of each source of a padded batch for its targets. A packed row has one row of values."""
    if values is None or len(values) == len(decoder_input_ids):
        return values
    return values.repeat_interleave(len(decoder_input_ids) // len(values), 0)


def get_layer_name(name: str) -> str:
    """Return a linear layer's last name, given its path or its weight's path, with an adapter or without."""
    return name.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2]
