"""All tensors of a model's folder by their names in the model.

The folder has one safetensors file, or several shards with `model.safetensors.index.json`, or the same with torch's
.bin files.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from t5tune.checkpoints.adapter_config import read_adapter_config
from t5tune.checkpoints.tensor_files.safetensors import SafetensorsFile
from t5tune.checkpoints.tensor_files.tensors import FLOAT_DTYPES, FileRange, SelectedRows, Tensor
from t5tune.checkpoints.tensor_files.torch_file import read_state_dict
from t5tune.errors import CheckpointError, ModelError
from t5tune.families.architecture import Architecture, Shapes
from t5tune.families.t5 import T5
from t5tune.file_names import ADAPTER_CONFIG_FILE, INDEX_SUFFIX, MODEL_BIN_FILE, MODEL_FILE
from t5tune.io.untrusted import has_file, is_file_name, read_json_object

WEIGHTS_FILES = {".safetensors": MODEL_FILE, ".bin": MODEL_BIN_FILE}  # suffix -> a model's file
OTHER_CONFIG_HINT = "config.json may belong to a different model, or lack a size: transformers then uses its default"
ENCODER_HINT = (
    "these weights have no decoder: an encoder alone can predict labels, with objective classify, regress or tag"
)
UNSUPPORTED_SUFFIXES = {".h5", ".msgpack", ".ckpt", ".gguf", ".onnx", ".pkl", ".pth", ".pt", ".npz"}


class Checkpoint:
    """The tensors of a model folder by their names in the model, except the tensors that the architecture drops.

    The default architecture, T5, keeps the names in the files.

    Attributes:
        shards: each weight file with the names of its tensors, in the order of their bytes.
        added: tensors that the files lack, which start at zero: a new head of labels.
    """

    def __init__(self, folder: Path, architecture: Architecture | None = None) -> None:
        self.folder = folder
        self.architecture = architecture or T5({})
        self._file_names: dict[str, str] = {}
        self.files: list[SafetensorsFile] = []
        self.shards: list[tuple[Path, list[str]]] = []
        self._sources: dict[str, SafetensorsFile | Tensor] = {}
        self.index, weight_map, paths = _find_weight_files(folder)
        found: dict[str, str] = {}
        for path in paths:
            sources: Mapping[str, SafetensorsFile | Tensor]
            if path.suffix == ".safetensors":
                self.files.append(SafetensorsFile(path))
                sources = dict.fromkeys(self.files[-1].entries, self.files[-1])
            else:
                sources = read_state_dict(path)
            self._add_file(path, sources)
            found |= dict.fromkeys(sources, path.name)
        self.added = self._add_initial_tensors()
        for name, file_name in weight_map.items():
            if found.get(name) != file_name:
                raise CheckpointError(f"{self.index}: {name}: is not in {file_name}")

    def _add_file(self, path: Path, sources: Mapping[str, SafetensorsFile | Tensor]) -> None:
        names = []
        for file_name, source in sources.items():
            name = self.architecture.to_model_name(file_name)
            if name in self:
                raise CheckpointError(f"{path}: {file_name}: is also in another file of this checkpoint")
            if self.architecture.is_dropped(name):
                continue
            self._sources[name], self._file_names[name] = source, file_name
            names.append(name)
        self.shards.append((path, names))

    def _add_initial_tensors(self) -> set[str]:
        """Add the weights that start at zero and that the files lack, after all tensors. Return their names."""
        added = {name: shape for name, shape in self.architecture.list_initial_shapes().items() if name not in self}
        self._sources |= {name: Tensor("F32", np.zeros(shape, np.float32)) for name, shape in added.items()}
        last = next((names for _, names in reversed(self.shards) if names), self.shards[-1][1])
        last.extend(added)
        return {*added}

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def list_names(self) -> list[str]:
        """List the tensors' names, file by file."""
        return list(self._sources)

    def get_file_name(self, name: str) -> str:
        """Return a tensor's name in the files of a checkpoint that is made from it."""
        return name if self.architecture.writes_model_names else self._file_names[name]

    def get_dtype_and_shape(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return a tensor's dtype and shape without mapping the file."""
        source = self._sources[name]
        entry = source.entries[self._file_names[name]] if isinstance(source, SafetensorsFile) else source
        return entry.dtype, entry.shape

    def get_file_range(self, name: str) -> FileRange | None:
        """Return the location of a tensor's bytes without mapping the file; None if they aren't contiguous."""
        source = self._sources[name]
        if isinstance(source, SafetensorsFile):
            return FileRange(source.path, source.entries[self._file_names[name]].begin)
        return source.file_range

    def get_tensor(self, name: str) -> Tensor:
        """Return the tensor as a view of a mapped file."""
        source = self._sources[name]
        return source.get_tensor(self._file_names[name]) if isinstance(source, SafetensorsFile) else source

    def select_rows(self, names: Iterable[str], rows: npt.NDArray[np.int64]) -> "Checkpoint":
        """Return the checkpoint with these rows of some tensors, in this order."""
        selected = copy.copy(self)
        selected.files = []  # whose headers have the shapes of whole tensors
        selected._sources = dict(self._sources)
        for name in names:
            source = self.get_tensor(name)
            selected._sources[name] = SelectedRows(source.dtype, source.array, source=source, rows=rows)
        return selected

    def is_tied(self) -> bool:
        """Whether the output head is tied to the embedding, as the weights show.

        config.json isn't reliable: transformers 5 writes `tie_word_embeddings: true` for any T5, whatever its weights.
        """
        head, embedding = self.architecture.head_weight, self.architecture.tied_to
        if head not in self:
            return True
        if embedding not in self:
            raise CheckpointError(f"{self.folder}: {embedding}: missing from the weights")
        return are_equal(self.get_tensor(head), self.get_tensor(embedding))

    def check_tensors(self, expected: Shapes | None = None) -> None:
        """Raise a ModelError if a tensor is missing or unknown, has a wrong shape, or isn't of floating-point numbers.

        Args:
            expected: shape of each parameter of the model; None: as config.json says.
        """
        architecture, found = self.architecture, set(self.list_names())
        if expected is None:
            shared = architecture.list_shared(self.is_tied())
            expected = {name: shape for name, shape in architecture.derive_shapes().items() if name not in shared}
        if missing := sorted(expected.keys() - found):
            raise ModelError(
                f"{self.folder}: {missing[0]}: missing from the weights (1 of {len(missing)} missing tensors)",
                hint=ENCODER_HINT
                if not any("decoder" in name for name in found)
                else "a file of the checkpoint may be missing, or config.json may belong to a different model",
            )
        unneeded = {*architecture.list_shared(tied=True), *architecture.ignored_tensors}
        if surplus := sorted(name for name in found - expected.keys() - unneeded if not architecture.is_skipped(name)):
            raise ModelError(
                f"{self.folder}: {surplus[0]}: the model of this config.json has no such tensor (1 of "
                f"{len(surplus)} unexpected tensors)",
                hint="give an adapter with --adapter; a base must contain only the model's tensors",
            )
        for name, by_config in expected.items():
            dtype, shape = self.get_dtype_and_shape(name)
            if shape != by_config:
                problem = f"{self.folder}: {name}: shape {[*shape]} in the file, {[*by_config]} by config.json"
                raise ModelError(problem, hint=OTHER_CONFIG_HINT)
            if dtype not in FLOAT_DTYPES:
                raise ModelError(f"{self.folder}: {name}: dtype {dtype} is not a floating-point type")

    def check_copies(self) -> None:
        """Raise a ModelError if a tensor that the model shares differs from its copy."""
        for name, original in self.architecture.always_shared.items():
            if name in self and not are_equal(self.get_tensor(name), self.get_tensor(original)):
                problem = f"{self.folder}: {name}: differs from {original}"
                raise ModelError(f"{problem}, but the model uses one weight for both")


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and values; NaN equals NaN."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    pairs = zip(first.iter_blocks(), second.iter_blocks(), strict=True)
    return all(np.array_equal(a.array, b.array, equal_nan=True) for (_, a), (_, b) in pairs)


def _find_weight_files(folder: Path) -> tuple[Path | None, dict[str, str], list[Path]]:
    """Find (index, its map of tensor names to files, weight files); without an index, None and an empty map."""
    for name in WEIGHTS_FILES.values():
        # a single file takes precedence over an index, as in transformers
        if has_file(folder, name):
            return None, {}, [folder / name]
        if has_file(folder, index := f"{name}{INDEX_SUFFIX}"):
            weight_map = _read_weight_map(folder, index)
            return folder / index, weight_map, _resolve_indexed_files(folder / index, weight_map)
    raise _explain_missing_weights(folder)


def _explain_missing_weights(folder: Path) -> CheckpointError:
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        try:
            name = read_adapter_config(folder).get("base_model_name_or_path")
        except CheckpointError:
            name = None
        hint = f"give its base instead: {name}" if name else "give the base that the adapter was trained on"
        return CheckpointError(f"{folder}: is an adapter, not a base", hint)
    problem = f"{folder}: no weights ({' or '.join(WEIGHTS_FILES.values())}"
    names = sorted(path.name for path in folder.glob("*") if path.name != "training_args.bin")
    if misnamed := [name for name in names if Path(name).suffix in WEIGHTS_FILES]:
        expected = WEIGHTS_FILES[Path(misnamed[0]).suffix]
        hint = f"if it contains the whole model, rename it to {expected}; shards need {expected}{INDEX_SUFFIX}"
        return CheckpointError(f"{problem}, or their {INDEX_SUFFIX} and its shards); found {misnamed[0]}", hint)
    if unsupported := [name for name in names if Path(name).suffix in UNSUPPORTED_SUFFIXES]:
        hint = "load the model with transformers and save it as safetensors"
        return CheckpointError(f"{problem}); the format of {unsupported[0]} isn't supported", hint)
    return CheckpointError(f"{problem})", "give a folder that save_pretrained wrote, or the name of a model on the Hub")


def _read_weight_map(folder: Path, name: str) -> dict[str, str]:
    weight_map = read_json_object(folder, name).get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(file, str) for file in weight_map.values())):
        expected = "expected a weight_map from tensor names to files"
        raise CheckpointError(f"{folder / name}: not an index of weights: {expected}")
    return weight_map


def _resolve_indexed_files(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    suffix = Path(index.name.removesuffix(INDEX_SUFFIX)).suffix
    names = sorted(set(weight_map.values()))
    for name in names:
        if not is_file_name(name):
            raise CheckpointError(f"{index}: {name!r}: points outside the folder")
        if not name.endswith(suffix):
            raise CheckpointError(f"{index}: {name!r}: expected a file that ends in {suffix}")
        if not has_file(index.parent, name):
            raise CheckpointError(f"{index.parent / name}: missing, but listed in {index.name}")
    return [index.parent / name for name in names]
