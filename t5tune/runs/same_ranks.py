"""Check that all ranks of a run have the same settings and the same inputs.

    check_same_settings(settings, settings.deepspeed, world)
    check_same_inputs(base, family, examples, held_out, world)

A launcher that is started on each node gives each its own environment and its own copy of a file. Rank 0 alone
validates the settings and compares them with a checkpoint's, so a rank with different settings would silently train
different weights, or wait in a collective that the other ranks never call.
"""

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from t5tune.checkpoints.base import open_base
from t5tune.checkpoints.fingerprint import compute_fingerprint
from t5tune.data.caches.examples import Examples
from t5tune.distributed.collectives import all_gather, run_on_rank_0
from t5tune.distributed.world import World
from t5tune.errors import SettingsError
from t5tune.formatting import abbreviate_value
from t5tune.runs.resume_guard import hash_examples
from t5tune.settings import packaged_templates
from t5tune.settings.affects import Affects, select_settings
from t5tune.settings.field_types import Settings
from t5tune.version import __version__

COMPARED_BY_VALUE = (Affects.STEPS, Affects.EVALUATION, Affects.ALL_RANKS)
COMPARED_IF_GIVEN = ("metric", "eval_data", "deepspeed")
"""Settings with paths, besides those that affect INPUT_FILES. Paths may differ between machines, so only their presence
is compared."""
COMPARED_PACKAGES = ("torch", "transformers", "peft")


def check_same_settings(settings: Settings, deepspeed: str | None, world: World) -> None:
    """Check that all ranks have the same settings and DeepSpeed config, as far as these affect the steps.

    Call on every rank, before any other collective that depends on a setting.

    Args:
        settings: all settings of a run.
        deepspeed: the setting `deepspeed`.

    Raises:
        SettingsError: a setting differs, on every rank; lists the settings with their values.
    """
    if world.size > 1:
        hint = "start all ranks with the same command, with the same --config and the same T5TUNE_ variables"
        _refuse_differences(world, _collect_settings(settings, deepspeed), hint)


def check_same_inputs(
    base: Path, family: str | None, examples: Examples, held_out: Examples | None, world: World
) -> None:
    """Check that all ranks have the same base, training examples and held-out data. Call on every rank."""
    if world.size == 1:
        return
    found = {
        "data": hash_examples(examples),
        "held_out": held_out and hash_examples(held_out),
        "base": compute_fingerprint(open_base(base, family)),
    }
    _refuse_differences(world, found, "give all ranks paths to the same files")


def _collect_settings(settings: Settings, deepspeed: str | None) -> dict[str, Any]:
    values = settings.model_dump(mode="json")
    names = {name for affects in COMPARED_BY_VALUE for name in select_settings(type(settings), affects)}
    compared_if_given = (*COMPARED_IF_GIVEN, *select_settings(type(settings), Affects.INPUT_FILES))
    found = dict(_flatten({name: value for name, value in values.items() if name in names}))
    found |= {name: None if values[name] is None else "given" for name in compared_if_given}
    if deepspeed is not None:
        try:
            config: Any = packaged_templates.read_deepspeed_config(deepspeed)
        except SettingsError as error:  # if all ranks have the same, rank 0 reports it when it checks its settings
            config = str(error)
        found |= _flatten({"deepspeed": config})
    # builds of the same release for other GPUs have other parts after the +
    versions = {name: metadata.version(name).partition("+")[0] for name in COMPARED_PACKAGES} | {"t5tune": __version__}
    return found | {f"version of {name}": version for name, version in versions.items()}


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings into dotted names: {"a": {"b": 1}} -> a.b, 1."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _refuse_differences(world: World, own: dict[str, Any], hint: str) -> None:
    """Compare the values of all ranks; a missing field counts as None."""
    gathered = all_gather(own)

    def refuse() -> None:
        if different := find_differences(gathered):
            raise SettingsError(*different, heading="the ranks of this run differ:", hint=hint)

    run_on_rank_0(world, refuse)


def find_differences(gathered: list[dict[str, Any]]) -> list[str]:
    """Describe the fields that differ between ranks: [{"a": 1}, {"a": 2}] -> ["a: 1 on rank 0, 2 on rank 1"]."""
    different = {}
    for name in dict.fromkeys(name for values in gathered for name in values):
        ranks: dict[str, list[int]] = {}
        for rank, values in enumerate(gathered):
            ranks.setdefault(json.dumps(values.get(name), sort_keys=True), []).append(rank)
        if len(ranks) > 1:
            texts = (f"{abbreviate_value(json.loads(value))} on {_name_ranks(own)}" for value, own in ranks.items())
            different[name] = f"{name}: {', '.join(texts)}"
    # without a DeepSpeed config on one of them, all of its fields differ, too
    return [line for name, line in different.items() if name.partition(".")[0] not in different.keys() - {name}]


def _name_ranks(ranks: list[int]) -> str:
    *first, last = map(str, ranks)
    if not first:
        return f"rank {last}"
    if len(first) > 1 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {last}"
    return f"ranks {', '.join(first)} and {last}"
