"""mixture.json: users may edit it, so it is checked as the settings in YAML are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.prepare import prepare
from t5tune.data.caches.prepared import open_examples
from t5tune.errors import DataError
from t5tune.settings import PrepareSettings
from tests.support.processes.command_line import t5tune_in_fork


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("sums", 14), ("words", 37), ("rare", 3)):
        lines = (f"{name} {number},{number}" for number in range(count))
        (folder / f"{name}.csv").write_text("\n".join(["source,target", *lines]))
    paths = [str(folder / name) for name in ("sums.csv", "words.csv:3", "rare.csv:0.2")]
    prepare(PrepareSettings(model_name_or_path="pocket", data_path=paths, output_dir=folder / "mixture"))
    return folder / "mixture"


@pytest.fixture
def edit(prepared: Path) -> Any:
    """Change mixture.json, which is restored after the test."""
    path = prepared / "mixture.json"
    before = path.read_bytes()

    def edit(change: Callable[[dict[str, Any]], Any]) -> Path:
        manifest = json.loads(before)
        change(manifest)
        path.write_text(json.dumps(manifest))
        return prepared

    yield edit
    path.write_bytes(before)


def set_dataset(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["datasets"][0].update(values)


def set_mixing(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["mixing"].update(values)


def set_all(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: [dataset.update({name: value}) for dataset in manifest["datasets"]]


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "negative": (set_dataset(weight=-1), "datasets[0].weight: -1: must be at least 0"),
    "all 0": (set_all("weight", 0), "datasets: every weight is 0, so there is nothing to train on"),
    "infinite": (set_dataset(weight=1e999), "not the manifest of a token cache (Infinity is not valid JSON)"),
    "text": (set_dataset(weight="1"), "datasets[0].weight: '1': expected a number"),
    "temperature": (set_mixing(temperature=0), "mixing.temperature: 0: must be greater than 0"),
    "cap": (set_mixing(cap=10**30), f"mixing.cap: {10**30}: must be less than {1 << 63}"),
    "cap 0": (set_mixing(cap=0), "mixing.cap: 0: must be greater than 0"),
    "kind": (set_mixing(kind="x"), "mixing.kind: 'x': expected 'weights', 'proportional' or 'concatenate'"),
    "unknown key": (set_mixing(temprature=2), "mixing.temprature: 2: unknown key"),
    "no effect": (set_mixing(kind="concatenate"), "datasets: weight: has no effect with mixing concatenate"),
    "same names": (set_all("name", "Sums"), "datasets: name: Sums: two datasets have this name; rename one of them"),
    "newline": (set_dataset(name="a\nb"), "datasets[0].name: 'a\\nb': expected letters, digits, `.`, `_` and `-`"),
    "reserved": (
        set_dataset(name="mixture.json"),
        "datasets[0].name: 'mixture.json': a file next to the datasets has this name",
    ),
    "num_data": (set_dataset(num_data=10**30), f"datasets[0].num_data: {10**30}: must be less than {1 << 63}"),
    "cache": (set_dataset(cache=3), "datasets[0].cache: 3: expected text"),
    "no datasets": (lambda manifest: manifest.update(datasets=[]), "datasets: []: must not be empty"),
    "no inputs": (lambda manifest: manifest.pop("inputs"), "inputs: missing"),
    "format": (lambda manifest: manifest.update(format=1), "format 1; this version of t5tune reads format 4"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_mixture_is_checked_as_yaml_is(name: str, edit: Any) -> None:
    change, problem = EDITS[name]
    folder = edit(change)
    with pytest.raises(DataError) as refused:
        open_examples(folder)
    assert f"{folder / 'mixture.json'}: {problem}" in refused.value.message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["negative", "same names"])
def test_a_run_refuses_an_edited_mixture_in_one_line(name: str, edit: Any, tmp_path: Path) -> None:
    change, problem = EDITS[name]
    common = ("--model-name-or-path", "pocket", "--data-path", edit(change))
    for command in (("train", *common, "--output-dir", tmp_path / "run"), ("inspect", edit(change))):
        done = t5tune_in_fork(*command)
        assert done.code == 2, done.stderr
        assert [line for line in done.stderr.splitlines() if line.strip()][-1].startswith("error: ")
        assert problem in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_edited_weights_count(edit: Any) -> None:
    mixture = open_examples(edit(set_all("weight", 2.5)))
    assert [float(share) for share in mixture.shares] == pytest.approx([1 / 3] * 3)
    assert [dataset["examples_per_epoch"] for dataset in mixture.manifest["datasets"]] == [18, 18, 18]
