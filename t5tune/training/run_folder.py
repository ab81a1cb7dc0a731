"""A run folder: where what stands in it, what it began with, and what it goes on from.

run = existing_run(settings)
facts, made_of, resume = begin(settings, run, cache, base, world, report)    # resume: run/checkpoint-40, or None
read_result(run.folder).adapter                                              # once it is finished
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5tune.checkpoints.fingerprint import base_facts
from t5tune.checkpoints.hash_cache import file_states, recall, remember
from t5tune.data.cache import Cache, is_cache, open_cache, read_manifest
from t5tune.distributed.world import World
from t5tune.errors import CheckpointError, SettingsError, TrainingError
from t5tune.io.atomic import write_file, writing
from t5tune.io.reasons import reason_of
from t5tune.io.yaml_file import read_yaml
from t5tune.progress import Note, Report
from t5tune.settings import TrainSettings, dump_settings, load_settings
from t5tune.settings.data import ReadingSettings, SelectionSettings
from t5tune.training.checkpoint import newest, remove_staged
from t5tune.training.resume_guard import check_same, identity

SETTINGS = "settings.yaml"
RESULT = "result.json"
SHAPING = {*ReadingSettings.model_fields, *SelectionSettings.model_fields, "model_max_length", "add_tokens"} - {
    "num_workers",
    "max_rejected_fraction",
}  # settings that make examples of conversations
BASE = "base.json"  # see checkpoints/hash_cache.py


@dataclass(frozen=True)
class Trained:
    """What train made. Times in seconds, memory in bytes; `tokens` are source and target tokens trained on.

    All but three are of the whole run, however often it was resumed: `resumed_from`, `seconds` (of everything) and
    `peak_memory_bytes` are of the process that finished it. `tokens_per_second` leaves out evaluations and saves.
    """

    run: Path
    adapter: Path
    steps: int
    epochs: float
    train_loss: float | None
    eval: dict[str, float]
    examples: int
    tokens: int
    tokens_per_second: float
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    world_size: int
    resumed_from: Path | None
    seconds: float


@dataclass(frozen=True)
class Run:
    """A run folder that is ready to be trained in."""

    folder: Path
    settings_path: Path
    cache: Path
    eval_cache: Path | None
    finished: bool


def existing_run(settings: TrainSettings) -> Run:
    """The run folder's paths, whether or not they exist yet."""
    folder = settings.output_dir
    cache = Path(settings.data_path[0])
    if not is_cache(cache):
        cache = settings.preprocessed_path or folder / "data"
    eval_cache = None
    if settings.eval_data_path:
        eval_cache = Path(settings.eval_data_path[0])
        if not is_cache(eval_cache):
            eval_cache = folder / "eval-data"
    return Run(folder, folder / SETTINGS, cache, eval_cache, (folder / RESULT).is_file())


@contextmanager
def only_run(folder: Path, report: Report) -> Iterator[None]:
    """Keep other processes from training in the folder meanwhile: two would mix their files.

    A lock on a file beside it, which ends with this process, however that may happen.

    Raises:
        SettingsError: another run holds it.
    """
    folder = folder.resolve()
    path = folder.with_name(f".{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
    except BlockingIOError:
        raise SettingsError(
            f"output_dir: {folder}: another run trains here", hint="wait for its end, or name another folder"
        ) from None
    except OSError as error:
        if path.parent.is_dir():  # else the folder itself can't be made, which is told where it is tried
            report(Note(f"{path}: {error.strerror}, so nothing keeps a second run out of {folder}", warning=True))
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it on the way out


def settings_of(run: Run) -> TrainSettings | None:
    """The settings of a run that has begun; None: there is none. Other commands keep theirs in a file of that name.

    Raises:
        SettingsError: the file isn't what train wrote.
    """
    if not run.settings_path.is_file() or "learning_rate" not in read_yaml(run.settings_path):
        return None
    return load_settings(TrainSettings, str(run.settings_path))[0]


def move_aside(folder: Path, report: Report) -> None:
    """Rename a folder that holds something to the first free of folder.1, folder.2, …"""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    aside = folder.with_name(f"{folder.name}.{number}")
    with writing(aside):
        folder.rename(aside)
    report(Note(f"{folder}: moved to {aside}"))


def with_those_of_cache(settings: TrainSettings) -> TrainSettings:
    """The settings as they hold: what shapes examples is the cache's where data_path is one."""
    cache = Path(settings.data_path[0])
    if not is_cache(cache):
        return settings
    inputs = read_manifest(cache)["inputs"]
    return settings.model_copy(update={name: inputs[name] for name in SHAPING if name in inputs})


def save_settings(settings: TrainSettings, run: Run) -> None:
    """The saved settings are to resume, not to begin anew or to change something once more."""
    again = with_those_of_cache(settings).model_copy(update={"fresh": False, "allow_change": []})
    write_file(run.settings_path, dump_settings(again).encode())


def open_data(settings: TrainSettings, run: Run) -> tuple[Cache, Cache | None]:
    """The examples to train on, and those held out."""
    cache = open_cache(run.cache)
    if settings.num_data is not None:
        cache = cache.first(settings.num_data)
    if run.eval_cache is not None:
        return cache, open_cache(run.eval_cache)
    if settings.eval_fraction > 0:
        return cache.split(settings.eval_fraction, settings.seed)
    return cache.parts()


def begin(
    settings: TrainSettings, run: Run, cache: Cache, base: Path, world: World, report: Report
) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
    """(what tells its base from others, what the run is made of, the checkpoint to go on from; None: there is none).

    Raises:
        CheckpointError: none is whole, or of another number of ranks than these.
        SettingsError: the run began with something else.
    """
    states = file_states(base)
    facts = _base_facts(base, settings, recall(run.folder / BASE, states))
    made_of = identity(settings, cache, facts["sha256"], world.size)
    resume, damaged = newest(run.folder)
    for problem in damaged:
        report(Note(f"passed over a damaged checkpoint: {problem}", warning=True))
    if damaged and resume is None:
        raise CheckpointError(f"{run.folder}: none of its checkpoints is whole", hint="--fresh begins anew")
    if resume:
        for change in check_same(resume, made_of, settings.allow_change):
            report(Note(f"changed on purpose: {change}", warning=True))
        report(Note(f"resuming from {resume}"))
    remove_staged(run.folder)
    save_settings(settings, run)
    remember(run.folder / BASE, states, facts["sha256"])
    return facts, made_of, resume


def read_result(folder: Path) -> Trained:
    """The result of a finished run.

    Raises:
        TrainingError: the run isn't finished.
    """
    try:
        values = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder / RESULT}: missing or broken: {reason_of(error)}") from error
    for name in ("run", "adapter", "resumed_from"):
        values[name] = Path(values[name]) if values[name] is not None else None
    return Trained(**values)


def _base_facts(base: Path, settings: TrainSettings, sha256: str | None) -> dict[str, Any]:
    """What tells merge whether a base is this one, and what of it the adapter saw."""
    facts: dict[str, Any] = dict(base_facts(base, settings.model_name_or_path, sha256))
    if settings.family is not None:
        facts["family"] = settings.family
    if settings.q_lora:
        compute = "bfloat16" if settings.bf16 else "float32"
        facts |= {"onto": settings.quant_type, "double_quant": settings.double_quant, "compute": compute}
    return facts
