"""Find and load the models of `serve`: choose their engines, and convert them for CTranslate2."""

import json
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5tune.checkpoints.adapter_config import PLAIN_INITIALIZATIONS, read_adapter_config
from t5tune.checkpoints.adapter_folder import is_adapter
from t5tune.checkpoints.base import find_model, read_config
from t5tune.checkpoints.fingerprint import are_settled, read_stats
from t5tune.checkpoints.model_folder import is_converted
from t5tune.checkpoints.training_data import read_label_task
from t5tune.commands.serve.convert_model import CTranslate2Fails, convert, convert_in_process
from t5tune.compat.ctranslate2_patches import CUBLAS_PACKAGE, load_cublas
from t5tune.constraints.compiler import Compiler
from t5tune.constraints.reading import read_constraint
from t5tune.converting.generation_config import describe_lost_settings, read_generation_config
from t5tune.errors import ModelError, SettingsError, naming_settings
from t5tune.families import CTRANSLATE2, find_family
from t5tune.formatting import shorten
from t5tune.inference.label_sources import make_reader
from t5tune.inference.loading import (
    ModelFiles,
    choose_family,
    find_base_and_adapter,
    load_for_inference,
    read_model_files,
)
from t5tune.inference.precision import Precision, read_trained_precision, resolve_precision, select_precision
from t5tune.inference.prompts import make_prompts
from t5tune.inference.shared_bases import SharedBases
from t5tune.io.processes import count_cores
from t5tune.io.reasons import join_lines
from t5tune.model.device import choose_device, describe_device
from t5tune.model.load import load_base
from t5tune.progress import Event, Note, Report
from t5tune.runs.checkpoints import replace_stopped_runs
from t5tune.settings import ServeSettings
from t5tune.settings.calls import TEXT_SETTINGS, refuse_text_settings
from t5tune.settings.groups.base import InferenceSettings

if TYPE_CHECKING:
    from t5tune.serving.generation import Engine
    from t5tune.serving.models import ServedModel

CORES_PER_BATCH = 4  # CTranslate2's own default: with more, a batch isn't much faster
OF_WEIGHTS = "default"  # CTranslate2's name for the type of a converted model's weights, if the device supports it
# compute types of weights in 16 bits -> the same without rounding, as --no-bf16 asks for
WITH_FLOAT32 = {
    "bfloat16": "float32", "float16": "float32", "int8_bfloat16": "int8_float32", "int8_float16": "int8_float32",
}  # fmt: skip
# engines depend on all settings except these settings of prompts and replies, and `needs_restart`
OF_REPLIES = {"models", "source_prefix", "model_max_length", *TEXT_SETTINGS} & ServeSettings.model_fields.keys()


@dataclass(frozen=True)
class _FoundModel:
    """A model that will be loaded.

    Args:
        base: the folder of its base, or of a model that was converted to CTranslate2.
        settings: with the folders of base and adapter; None for a converted model.
        precision: as in training, unless the user says otherwise; None for a converted model.
        reason: why CTranslate2 can't run it.
    """

    base: Path
    settings: InferenceSettings | None
    precision: Precision | None
    reason: str | None
    with_ctranslate2: bool
    predicts_labels: bool = False


class ModelLoader:
    """Loads the models of the settings, and uses the engines of an earlier loader whose files haven't changed."""

    def __init__(self, settings: ServeSettings, report: Report, earlier: "ModelLoader | None" = None) -> None:
        self._settings = settings
        self._report = report
        self._is_reload = earlier is not None
        self._bases: SharedBases = SharedBases() if earlier is None else earlier._bases
        self._earlier = {} if earlier is None else earlier._loaded
        self._loaded: dict[Hashable, tuple[Engine, ModelFiles]] = {}
        self._started_at = time.time()
        self._precisions: dict[str, dict[str, Precision]] = {}  # base -> model -> the precision of the model's base
        self._device = choose_device(settings.use_cpu, name=settings.device)
        self.unchanged: list[str] = []  # models whose engines were used again

    def load_all(self) -> dict[str, "ServedModel"]:
        """Load all models, and generate a token with each engine."""
        read_constraint(self._settings, None)  # raises before a model is loaded
        # all are found before the first is converted, which may take minutes
        found = {name: self._find(name, model) for name, model in self._settings.named_models.items()}
        if all(model.predicts_labels for model in found.values()):
            refuse_text_settings(self._settings, "no served model writes text")
        models = {name: self._load(name, files) for name, files in found.items()}
        self._earlier = {}  # frees what isn't used any more
        return models

    def _find(self, name: str, model: str) -> "_FoundModel":
        """Find the files of a model, and choose its engine.

        Raises:
            ModelError, CheckpointError: there is no such model.
            SettingsError: the engine of the settings can't run it.
        """
        if is_converted(Path(model)):
            self._check_converted(name, model)
            return _FoundModel(Path(model), None, None, None, with_ctranslate2=True)
        report = self._name_notes(name)
        with naming_settings(model_name_or_path="models", adapter="models"):
            settings = self._find_base_and_adapter(model, report)
        base, engine = Path(settings.model_name_or_path), self._settings.engine
        trained = read_trained_precision(base, settings.adapter)
        precision = resolve_precision(select_precision(settings), trained, self._device, report)
        predicts_labels, reason = read_label_task(settings.adapter or base) is not None, None
        if engine != "transformers" and predicts_labels:
            reason = "it predicts labels"
        elif engine != "transformers":
            reason = self._find_obstacle(base, settings.family, precision, trained)
        if reason is not None:
            self._check_fallback(name, reason)
        with_ctranslate2 = engine != "transformers" and reason is None
        return _FoundModel(base, settings, precision, reason, with_ctranslate2, predicts_labels)

    def _load(self, name: str, found: "_FoundModel") -> "ServedModel":
        report = self._name_notes(name)
        identity = self._identify(found)
        if identity in self._earlier:
            self.unchanged.append(name)
            self._loaded[identity] = self._earlier[identity]
            return self._make_model(name, *self._loaded[identity], report)
        self._loaded[identity] = self._load_engine(name, found, report)
        if self._is_reload and self._identify(found) != identity:
            raise ModelError(f"{name}: its files changed while they were read", hint="reload once they are complete")
        return self._make_model(name, *self._loaded[identity], report)

    def _identify(self, found: "_FoundModel") -> Hashable:
        """Identify an engine by its files and its settings."""
        adapter = None if found.settings is None else found.settings.adapter
        settings = self._settings.model_dump_json(exclude=OF_REPLIES | set(ServeSettings.needs_restart))
        files = self._identify_files(found.base), adapter and self._identify_files(adapter)
        return *files, str(found.precision), found.with_ctranslate2, settings

    def _identify_files(self, folder: Path) -> str:
        """Identify the files of a folder by their sizes and times."""
        stats = read_stats(file for file in folder.iterdir() if file.is_file())
        # a further change to new files may keep their times, so only this loader finds them unchanged
        found_by = None if are_settled(stats, self._started_at) else self._started_at
        return json.dumps([str(folder), stats, found_by])

    def _load_engine(self, name: str, found: "_FoundModel", report: Report) -> "tuple[Engine, ModelFiles]":
        """Load a model that was found; for CTranslate2 it is converted first."""
        if found.settings is None or found.precision is None:
            is_chosen = self._settings.quantization is not None or self._settings.bf16
            compute_type = self._choose_compute_type(in_bf16=True) if is_chosen else OF_WEIGHTS
            return self._make_translator(found.base, compute_type, report)
        reason = found.reason
        if found.with_ctranslate2:
            try:
                return self._load_with_ctranslate2(name, found.base, found.settings.adapter, found.precision, report)
            except CTranslate2Fails as error:
                reason = str(error)
                self._check_fallback(name, reason)
        report(Note("with transformers" + (f": {reason}" if reason else "")))
        return self._load_with_transformers(name, found.settings, found.precision, report)

    def _name_notes(self, name: str) -> Report:
        def report(event: Event) -> None:
            self._report(Note(f"{name}: {event.text}", event.warning) if isinstance(event, Note) else event)

        return report

    def _check_converted(self, name: str, model: str) -> None:
        """Refuse settings that don't suit a folder from `merge --to ctranslate2`."""
        hint = "name the adapter or the merged checkpoint instead"
        if self._settings.engine == "transformers" or self._settings.q_lora:
            setting = "q_lora" if self._settings.q_lora else "engine: transformers"
            problem = f"{setting}: {model} was converted to CTranslate2"
            raise SettingsError(problem, hint=hint)
        if lost := describe_lost_settings(Path(model)):
            raise SettingsError(f"models: {name}: {lost}", hint=f"{hint}, or remove these settings from the file")

    def _find_base_and_adapter(self, model: str, report: Report) -> InferenceSettings:
        """Return settings with the folders of a model's base and adapter (for a stopped run, its newest checkpoint)."""
        given = {name: getattr(self._settings, name) for name in self._settings.model_fields_set}
        common = {name: value for name, value in given.items() if name in InferenceSettings.model_fields}
        base, revision = common.pop("model_name_or_path", None), common.pop("revision", None)
        settings = replace_stopped_runs(InferenceSettings(model_name_or_path=model, **common), report)
        if base is not None and is_adapter(folder := find_model(settings, report=report)):
            settings = InferenceSettings(model_name_or_path=base, revision=revision, adapter=folder, **common)
        found, adapter = find_base_and_adapter(settings, report)
        family = choose_family(settings, adapter)
        changes = {"model_name_or_path": str(found), "adapter": adapter, "revision": None, "family": family}
        return settings.model_copy(update=changes)

    def _find_obstacle(
        self, base: Path, family_key: str | None, precision: Precision, trained: Mapping[str, Any]
    ) -> str | None:
        """Find why CTranslate2 can't run a model as the settings say; None if it can.

        CTranslate2 lacks bitsandbytes' quantization, but a merge into training's quantized weights has their values.
        """
        settings, device = self._settings, self._device
        try:
            import ctranslate2
        except ImportError as error:
            return f"CTranslate2 can't be imported: {error}"
        family = find_family(read_config(base), base, family_key)
        if CTRANSLATE2 not in family.converters:
            return f"{family.name} can't be converted to CTranslate2"
        if family_key is not None:
            return "a model type that --family gives can't be converted to CTranslate2"
        if settings.q_lora:
            return "q_lora: quantized by bitsandbytes"
        if precision.quantization not in (None, resolve_precision({}, trained, None).quantization):
            return "quantized by bitsandbytes in a different way than in training"
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not ctranslate2.get_cuda_device_count()):
            return f"CTranslate2 can't use the device {device}"
        return describe_lost_settings(base)

    def _check_fallback(self, name: str, reason: str) -> None:
        settings = self._settings
        if settings.engine == "ctranslate2":
            also = "" if settings.quantization is None else " and --quantization"
            problem = f"engine: ctranslate2: {name}: {reason}"
            raise SettingsError(problem, hint=f"leave out --engine{also}, to use transformers")
        if settings.quantization is not None:
            problem = (
                f"quantization: {settings.quantization}: only with CTranslate2, which can't serve {name}: {reason}"
            )
            hint = "leave out --quantization; transformers quantizes with --q-lora --quant-type int8"
            raise SettingsError(problem, hint=hint)

    def _choose_compute_type(self, in_bf16: bool) -> str:
        """Choose CTranslate2's compute type: the quantization, else bf16 where it can, as `chat` does, else fp32."""
        import ctranslate2

        settings, device = self._settings, self._device
        setting = "bf16" if settings.quantization is None else "quantization"
        chosen = settings.quantization or ("bfloat16" if in_bf16 else "float32")
        supported = ctranslate2.get_supported_compute_types(device.type, device.index or 0)
        if chosen not in supported and settings.quantization is None and settings.bf16 is None:
            return "float32"
        if chosen not in supported:
            problem = f"{setting}: {chosen}: CTranslate2 can't compute in it on this {device.type.upper()}"
            raise SettingsError(problem, hint=f"choose one of {', '.join(sorted(supported))}")
        return chosen

    def _load_with_ctranslate2(
        self, name: str, base: Path, adapter: Path | None, precision: Precision, report: Report
    ) -> "tuple[Engine, ModelFiles]":
        from t5tune.serving.converted import find_converted, get_default_folder

        compute_type, quantization = self._choose_compute_type(precision.bf16), self._settings.quantization
        if precision.bf16 and compute_type == "float32" and quantization is None:
            report(Note(f"CTranslate2 can't compute in bf16 on {describe_device(self._device)}; computing in fp32"))
        onto = "base" if precision.quantization is None else precision.quantization.quant_type

        def convert_to(folder: Path) -> None:
            report(Note("converting to CTranslate2, only once"))
            how = convert_in_process if self._is_reload else convert
            how(report, base=base, adapter=adapter, onto=onto, quantization=quantization, folder=folder)

        folder = self._settings.converted_dir or get_default_folder()
        found = find_converted(folder.absolute(), name, base, adapter, onto, quantization, convert_to, report)
        loaded = self._make_translator(found, compute_type, report)
        if onto != "base":
            report(Note(f"its adapter is merged into the {onto} weights of training"))
        return loaded

    def _make_translator(self, folder: Path, compute_type: str, report: Report) -> "tuple[Engine, ModelFiles]":
        from t5tune.serving.engines import TranslatorEngine

        files = read_model_files(folder, None)
        other_ends = read_generation_config(folder).get("eos_token_id") or []
        other_ends = other_ends if isinstance(other_ends, list) else [other_ends]
        stop_ids = frozenset([files.tokenizer.eos_token_id, *other_ends])
        on_cpu = self._device.type == "cpu"
        batches = self._settings.parallel_batches or (max(1, count_cores() // CORES_PER_BATCH) if on_cpu else 1)
        engine = TranslatorEngine(folder, self._device, compute_type, stop_ids, batches)
        if compute_type == OF_WEIGHTS and self._settings.bf16 is False and engine.compute_type in WITH_FLOAT32:
            compute_type = WITH_FLOAT32[engine.compute_type]
            del engine  # first: both may not fit into memory
            engine = TranslatorEngine(folder, self._device, compute_type, stop_ids, batches)
        try:
            _try_one_token(engine, files)
        except RuntimeError as error:
            problem = f"CTranslate2 can't compute on {self._device}: {shorten(join_lines(error), 300)}"
            has_library = self._device.type != "cuda" or load_cublas()
            raise CTranslate2Fails(problem, hint=None if has_library else f"pip install {CUBLAS_PACKAGE}") from error
        report(Note(f"with CTranslate2, {engine.compute_type}"))
        return engine, files

    def _load_with_transformers(
        self, name: str, settings: InferenceSettings, precision: Precision, report: Report
    ) -> "tuple[Engine, ModelFiles]":
        from t5tune.serving.engines import LabelEngine, TransformersEngine

        # PEFT subtracts some initializations from the base's weights
        adapter = settings.adapter
        is_plain = adapter is None or read_adapter_config(adapter).get("init_lora_weights") in PLAIN_INITIALIZATIONS
        files = self._identify_files(Path(settings.model_name_or_path))
        load = partial(self._bases.load, files=files) if is_plain else load_base
        self._report_other_precision(name, settings, precision, report)
        loaded = load_for_inference(settings, report, self._device, load_base=load, precision=precision)
        pad_token_id = loaded.tokenizer.pad_token_id
        engine: Engine
        if loaded.label_task is not None:
            engine = LabelEngine(loaded.model, pad_token_id)
        else:
            engine = TransformersEngine(loaded.model, loaded.tokenizer.eos_token_id, pad_token_id)
        _try_one_token(engine, loaded)
        return engine, loaded

    def _report_other_precision(
        self, name: str, settings: InferenceSettings, precision: Precision, report: Report
    ) -> None:
        """Report a base that is loaded once more because its adapters were trained differently."""
        loaded = self._precisions.setdefault(settings.model_name_or_path, {})
        if loaded and precision not in loaded.values():
            other = next(iter(loaded))
            report(Note(f"loading the base once more, in {precision}: {other} has it in {loaded[other]}"))
        loaded[name] = precision

    def _make_model(self, name: str, engine: "Engine", files: ModelFiles, report: Report) -> "ServedModel":
        from t5tune.serving.generation import DecodingOptions
        from t5tune.serving.models import LabelModel, TextModel

        settings = self._settings
        if files.label_task is not None:
            reader = make_reader(files, settings.source_prefix, settings.model_max_length, report)
            return LabelModel(name, engine, settings.model_max_length, reader)
        prompts = make_prompts(
            files, settings.conversation_template, settings.source_prefix, settings.model_max_length, report
        )
        if not prompts.keeps_history:
            report(Note("earlier messages are left out: this model was trained on single exchanges"))
        defaults = DecodingOptions(settings.max_new_tokens, settings.temperature, settings.top_p)
        # a model has learned to write targets of at most model_max_length
        longest = max(settings.max_new_tokens, settings.model_max_length)
        compiler = Compiler(files.tokenizer, engine.num_rows, sorted(engine.stop_ids), prompts.template.answer_suffix)
        if (constraint := read_constraint(settings, files.json_schema)) is not None:
            compiler.start(constraint)  # raises now, not for each request
        max_length = settings.model_max_length
        return TextModel(name, engine, max_length, prompts, defaults, longest, compiler, constraint)


def _try_one_token(engine: "Engine", files: ModelFiles) -> None:
    """Generate a token: on a GPU, CTranslate2 loads its libraries only now."""
    from t5tune.serving.generation import DecodingOptions, Generation

    source = next([index] for index in range(len(files.tokenizer)) if engine.can_read([index]))
    generation = Generation(engine, source, DecodingOptions(max_new_tokens=1), notify=lambda: None)
    engine.generate([generation], lambda row, token: generation.add(token))
    if generation.ended is None:
        raise ModelError(f"{files.base}: {engine.name} generates no token")
