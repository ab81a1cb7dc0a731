"""Encoders that predict labels: transformers' …ForTokenClassification, with one linear layer on each token.

    architecture = make_encoder(family.bind(config), LabelTask(...))
    architecture.head_weight    # "classifier.weight"

The model has no decoder, and its modules have the names of transformers' class. Checkpoints of a whole model and of an
encoder alone lack a prefix of these names and the head, which then starts at zero. A text's logits are the mean of its
tokens' logits, which equals mean pooling and a linear layer.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from t5tune.errors import SettingsError
from t5tune.families.architecture import Architecture, Dimensions, Shapes
from t5tune.families.t5 import MT5, T5, UMT5
from t5tune.families.t5gemma import T5Gemma


class Task(Protocol):
    """The attributes of data.labels.LabelTask that this package needs, which imports no settings."""

    @property
    def objective(self) -> str: ...
    @property
    def per_token(self) -> bool: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def num_outputs(self) -> int: ...
    @property
    def problem_type(self) -> str: ...


class Encoder(Architecture):
    """The encoder of an architecture, with a head of labels.

    Attributes:
        prefix: of the encoder's modules; only files of transformers' class with a head have it.
        dropped_prefixes: of the decoder's and its head's tensors, which the model doesn't have.
        class_name: of transformers' class.
    """

    writes_model_names = True
    prefix: ClassVar[str]
    dropped_prefixes: ClassVar[tuple[str, ...]]
    class_name: ClassVar[str]

    def __init__(self, config: Mapping[str, Any], task: Task) -> None:
        self.task = task
        super().__init__({**config, **self.describe_head()})

    def describe_head(self) -> dict[str, Any]:
        """Return the values that config.json gets."""
        names = self.task.names or ("LABEL_0",)
        return {
            "architectures": [self.class_name],
            "is_encoder_decoder": False,
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": self.task.problem_type,
        }

    def to_model_name(self, file_name: str) -> str:
        known = (self.prefix, f"{self.head}.", *self.dropped_prefixes)
        return file_name if file_name.startswith(known) else f"{self.prefix}{file_name}"

    def is_dropped(self, name: str) -> bool:
        return name.startswith(self.dropped_prefixes)

    def list_shared(self, tied: bool) -> dict[str, str]:
        return {**self.always_shared}

    @property
    def dimensions(self) -> Dimensions:
        return replace(super().dimensions, num_decoder_layers=0, cache_width=0)  # type: ignore[safe-super]

    def derive_shapes(self) -> Shapes:
        whole = super().derive_shapes()  # type: ignore[safe-super]
        named = {self.to_model_name(name): shape for name, shape in whole.items()}
        shapes = {name: shape for name, shape in named.items() if not self.is_dropped(name)}
        _, width = shapes[self.tied_to]
        return shapes | {
            self.head_weight: (self.task.num_outputs, width),
            f"{self.head}.bias": (self.task.num_outputs,),
        }

    def list_initial_shapes(self) -> Shapes:
        return {name: shape for name, shape in self.derive_shapes().items() if name.startswith(f"{self.head}.")}

    def classify(self, name: str) -> str:
        return "head" if name.startswith(f"{self.head}.") else super().classify(name)  # type: ignore[safe-super]


class T5Encoder(Encoder, T5):
    """T5's encoder."""

    prefix = "transformer."
    dropped_prefixes = ("transformer.decoder.", "transformer.lm_head.")
    class_name = "T5ForTokenClassification"
    head = "classifier"
    embedding = "transformer.shared"
    tied_to = f"{embedding}.weight"
    token_row_modules = ()
    always_shared: ClassVar[Mapping[str, str]] = {"transformer.encoder.embed_tokens.weight": tied_to}
    encoder_module = "transformer.encoder"


class MT5Encoder(T5Encoder, MT5):
    """mT5's encoder."""

    class_name = "MT5ForTokenClassification"


class UMT5Encoder(T5Encoder, UMT5):
    """umT5's encoder."""

    class_name = "UMT5ForTokenClassification"


class T5GemmaEncoder(Encoder, T5Gemma):
    """T5Gemma's encoder."""

    prefix = "model."
    dropped_prefixes = ("model.decoder.", "lm_head.")
    class_name = "T5GemmaForTokenClassification"
    head = "score.out_proj"
    tied_to = f"{T5Gemma.encoder}.embed_tokens.weight"
    trainable_modules = tuple(
        name for name in T5Gemma.trainable_modules if "cross" not in name and T5Gemma.decoder not in name
    )


ENCODERS: dict[str, type[Encoder]] = {
    each.model_type: each for each in (T5Encoder, MT5Encoder, UMT5Encoder, T5GemmaEncoder)
}


def find_encoder_class(architecture: Architecture | type[Architecture], objective: str) -> type[Encoder]:
    """Find the class of an architecture's encoder.

    Raises:
        SettingsError: transformers has no token classifier for it, or only with the decoder.
    """
    if architecture.model_type not in ENCODERS:
        raise SettingsError(
            f"objective: {objective}: transformers has no encoder-only token classifier for {architecture.model_type}",
            hint=f"choose a model of type {', '.join(ENCODERS)}, or predict labels as text with objective sft",
        )
    return ENCODERS[architecture.model_type]


def make_encoder(architecture: Architecture, task: Task | None) -> Architecture:
    """Return the encoder of an architecture with a head for the task; without a task, the architecture itself."""
    if task is None:
        return architecture
    return find_encoder_class(architecture, task.objective)(architecture.config, task)
