"""`t5tune serve`: serve models over HTTP, for clients of OpenAI's API.

    with serve(ServeSettings(models=["base=google/flan-t5-base", "tuned=run"])) as server:
        print(server.url)
        server.wait()

Greedy replies equal `chat`'s with the same model, settings and prompt. In bf16 and int8, where the sums of a batch are
rounded coarsely, the replies of a batch may differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

from t5tune.checkpoints.adapter import check_adapter, read_adapter
from t5tune.checkpoints.adapter_config import PLAIN_INITIALIZATIONS, read_adapter_config
from t5tune.checkpoints.adapter_folder import is_adapter
from t5tune.checkpoints.base import find_model, read_config
from t5tune.checkpoints.model_folder import is_converted
from t5tune.commands.merge import merge
from t5tune.compat.ctranslate2_patches import CUBLAS_PACKAGE, load_cublas
from t5tune.compat.quiet import quiet_libraries
from t5tune.constraints.compiler import Compiler
from t5tune.constraints.reading import read_constraint
from t5tune.converting.generation_config import describe_lost_settings, read_generation_config
from t5tune.errors import CheckpointError, DependencyError, ModelError, SettingsError, naming_settings
from t5tune.families import CTRANSLATE2, find_family
from t5tune.formatting import format_count, shorten
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
from t5tune.io.atomic import write_folder_atomically
from t5tune.io.processes import count_cores
from t5tune.io.reasons import join_lines
from t5tune.model.device import choose_device, describe_device
from t5tune.model.load import load_base
from t5tune.progress import Event, Note, Report, silent
from t5tune.runs.checkpoints import replace_stopped_runs
from t5tune.settings import MergeSettings, ServeSettings
from t5tune.settings.calls import check_call
from t5tune.settings.groups.base import InferenceSettings

if TYPE_CHECKING:
    from t5tune.serving.generation import Engine
    from t5tune.serving.models import ServedModel
    from t5tune.serving.server import HttpServer

CORES_PER_BATCH = 4  # CTranslate2's own default: with more, a batch isn't much faster
OF_WEIGHTS = "default"  # CTranslate2's name for the type of a converted model's weights, if the device supports it
# compute types of weights in 16 bits -> the same without rounding, as --no-bf16 asks for
WITH_FLOAT32 = {
    "bfloat16": "float32", "float16": "float32", "int8_bfloat16": "int8_float32", "int8_float16": "int8_float32",
}  # fmt: skip
PACKAGES = "starlette uvicorn prometheus-client"


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Args:
        models: name -> what computes its replies, `ctranslate2` or `transformers`.
        needs_key: whether clients must send a key.
    """

    url: str
    models: dict[str, str]
    needs_key: bool


class Server:
    """A running server. As a context manager it stops at the end of the block."""

    def __init__(self, address: Address, http: "HttpServer", settings: ServeSettings, report: Report) -> None:
        self.address = address
        self._http = http
        self._timeout = settings.shutdown_timeout
        self._report = report
        self._is_stopped = False
        self._stopping = Lock()

    @property
    def url(self) -> str:
        """Such as http://127.0.0.1:8000."""
        return self.address.url

    def wait(self) -> None:
        """Wait until another thread has stopped the server, or a signal raises KeyboardInterrupt."""
        self._http.wait()

    def stop(self) -> None:
        """Refuse new requests, finish the replies that are being computed, and free the address."""
        with self._stopping:
            if self._is_stopped:
                return
            self._is_stopped = True
            if cut_off := self._http.stop(self._timeout):
                replies = format_count(cut_off, "reply", "replies")
                self._report(Note(f"{replies} cut off after {self._timeout:g} seconds", warning=True))

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def serve(settings: ServeSettings, report: Report = silent) -> Server:
    """Load the models and start a server.

    Raises:
        DependencyError: a package of the extra `serve` isn't installed.
        SettingsError: the address can't be used, or the engine can't run a model as the settings say.
        ModelError, CheckpointError: a model can't be used.
    """
    report = check_call("serve", settings, ServeSettings, report)
    try:
        from t5tune.serving.app import Service
        from t5tune.serving.batching import Schedule
        from t5tune.serving.computing import Batcher
        from t5tune.serving.metrics import Metrics
        from t5tune.serving.server import HttpServer, bind, format_url
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        problem = f"serve: {package} isn't installed"
        raise DependencyError(problem, hint=f"pip install {PACKAGES}") from error
    listener = bind(settings.host, settings.port)
    try:
        with quiet_libraries():
            loader = _Loader(settings, report)
            # all are found before the first is converted, which may take minutes
            found = {name: loader.find(name, model) for name, model in settings.named_models.items()}
            models = {name: loader.load(name, files) for name, files in found.items()}
        metrics = Metrics()
        schedule = Schedule(settings.max_batch_tokens, settings.max_queue)
        metrics.watch(schedule)
        batcher = Batcher(
            schedule,
            max_delay=settings.max_batch_delay / 1000,
            num_threads=max(model.engine.max_batches for model in models.values()),
            on_batch=metrics.count_batch,
        )
        max_replies = min(settings.max_replies, settings.max_queue)
        service = Service(models, batcher, metrics, max_replies, settings.api_key, settings.is_local, report)
        url = format_url(listener, settings.host)
        http = HttpServer(service, listener, batcher)
    except BaseException:
        listener.close()
        raise
    engines = {name: model.engine.name for name, model in models.items()}
    return Server(Address(url, engines, settings.api_key is not None), http, settings, report)


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


class _CTranslate2Fails(ModelError):
    """CTranslate2 can't run a model, although no obstacle was known."""


class _Loader:
    def __init__(self, settings: ServeSettings, report: Report) -> None:
        self._settings = settings
        self._report = report
        self._bases = SharedBases()
        self._precisions: dict[str, dict[str, Precision]] = {}  # base -> model -> the precision of the model's base
        self._device = choose_device(settings.use_cpu, name=settings.device)

    def find(self, name: str, model: str) -> "_FoundModel":
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
        reason = None if engine == "transformers" else self._find_obstacle(base, settings.family, precision, trained)
        if reason is not None:
            self._check_fallback(name, reason)
        with_ctranslate2 = engine != "transformers" and reason is None
        return _FoundModel(base, settings, precision, reason, with_ctranslate2)

    def load(self, name: str, found: "_FoundModel") -> "ServedModel":
        """Load a model that was found; for CTranslate2 it is converted first."""
        report = self._name_notes(name)
        if found.settings is None or found.precision is None:
            is_chosen = self._settings.quantization is not None or self._settings.bf16
            compute_type = self._choose_compute_type(in_bf16=True) if is_chosen else OF_WEIGHTS
            return self._make_ctranslate2_model(name, found.base, compute_type, report)
        reason = found.reason
        if found.with_ctranslate2:
            try:
                return self._load_with_ctranslate2(name, found.base, found.settings.adapter, found.precision, report)
            except _CTranslate2Fails as error:
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
    ) -> "ServedModel":
        from t5tune.serving.converted import find_converted, get_default_folder

        compute_type, quantization = self._choose_compute_type(precision.bf16), self._settings.quantization
        if precision.bf16 and compute_type == "float32" and quantization is None:
            report(Note(f"CTranslate2 can't compute in bf16 on {describe_device(self._device)}; computing in fp32"))
        onto = "base" if precision.quantization is None else precision.quantization.quant_type

        def convert(folder: Path) -> None:
            report(Note("converting to CTranslate2, only at the first start"))
            if adapter is not None:
                settings = MergeSettings(
                    model_name_or_path=str(base),
                    adapter=[adapter],
                    output_dir=folder,
                    to="ctranslate2",
                    onto=onto,
                    quantization=quantization,
                    # rounded to the dtype of the base, the sums would give different replies from `chat`; and a
                    # conversion serves all compute types
                    dtype="float32",
                )
                try:
                    merge(settings, report)
                except CheckpointError as error:
                    config, state = read_adapter(adapter)
                    check_adapter(state, config, adapter, must_be_trained=False)  # a broken adapter isn't served at all
                    # without the hint, which is for users of `merge`
                    reason = f"its adapter can't be merged for CTranslate2: {error.message}"
                    raise _CTranslate2Fails(reason) from error
                return
            from t5tune.converting.ctranslate2 import convert_and_check

            with write_folder_atomically(folder) as staged:
                convert_and_check(base, base, staged, quantization, report)

        folder = self._settings.converted_dir or get_default_folder()
        found = find_converted(folder.absolute(), name, base, adapter, onto, quantization, convert, report)
        model = self._make_ctranslate2_model(name, found, compute_type, report)
        if onto != "base":
            report(Note(f"its adapter is merged into the {onto} weights of training"))
        return model

    def _make_ctranslate2_model(self, name: str, folder: Path, compute_type: str, report: Report) -> "ServedModel":
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
            engine.try_one_token()
        except RuntimeError as error:
            problem = f"CTranslate2 can't compute on {self._device}: {shorten(join_lines(error), 300)}"
            has_library = self._device.type != "cuda" or load_cublas()
            raise _CTranslate2Fails(problem, hint=None if has_library else f"pip install {CUBLAS_PACKAGE}") from error
        report(Note(f"with CTranslate2, {engine.compute_type}"))
        return self._make_model(name, engine, files, engine.num_rows, report)

    def _load_with_transformers(
        self, name: str, settings: InferenceSettings, precision: Precision, report: Report
    ) -> "ServedModel":
        from t5tune.serving.engines import TransformersEngine

        # PEFT subtracts some initializations from the base's weights
        adapter = settings.adapter
        is_plain = adapter is None or read_adapter_config(adapter).get("init_lora_weights") in PLAIN_INITIALIZATIONS
        load = self._bases.load if is_plain else load_base
        self._report_other_precision(name, settings, precision, report)
        loaded = load_for_inference(settings, report, self._device, load_base=load, precision=precision)
        tokenizer = loaded.tokenizer
        engine = TransformersEngine(loaded.model, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return self._make_model(name, engine, loaded, loaded.num_rows, report)

    def _report_other_precision(
        self, name: str, settings: InferenceSettings, precision: Precision, report: Report
    ) -> None:
        """Report a base that is loaded once more because its adapters were trained differently."""
        loaded = self._precisions.setdefault(settings.model_name_or_path, {})
        if loaded and precision not in loaded.values():
            other = next(iter(loaded))
            report(Note(f"loading the base once more, in {precision}: {other} has it in {loaded[other]}"))
        loaded[name] = precision

    def _make_model(
        self, name: str, engine: "Engine", files: ModelFiles, num_rows: int, report: Report
    ) -> "ServedModel":
        from t5tune.serving.generation import DecodingOptions
        from t5tune.serving.models import ServedModel

        settings = self._settings
        prompts = make_prompts(
            files, settings.conversation_template, settings.source_prefix, settings.model_max_length, report
        )
        if not prompts.keeps_history:
            report(Note("earlier messages are left out: this model was trained on single exchanges"))
        defaults = DecodingOptions(settings.max_new_tokens, settings.temperature, settings.top_p)
        # a model has learned to write targets of at most model_max_length
        longest = max(settings.max_new_tokens, settings.model_max_length)
        compiler = Compiler(files.tokenizer, num_rows, sorted(engine.stop_ids), prompts.template.answer_suffix)
        if (constraint := read_constraint(settings, files.json_schema)) is not None:
            compiler.start(constraint)  # raises now, not for each request
        return ServedModel(name, engine, prompts, defaults, longest, compiler, constraint)
