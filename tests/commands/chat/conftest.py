"""What tests of chat share."""

import json
from pathlib import Path

import pytest

from t5tune.commands.export import export
from t5tune.commands.merge import merge
from t5tune.commands.train import train
from t5tune.settings import ExportSettings, MergeSettings, TrainSettings


@pytest.fixture(scope="module")
def made(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, its export, and its merged checkpoint."""
    folder = tmp_path_factory.mktemp("chat")
    train(
        TrainSettings(
            model_name_or_path=str(untied_base),
            data_path=str(conversations),
            output_dir=folder / "run",
            max_steps=8,
            learning_rate=2e-2,
            use_cpu=True,
            report_samples=0,
        )
    )
    export(ExportSettings(checkpoint=folder / "run", output_dir=folder / "adapter"))
    merge(
        MergeSettings(
            model_name_or_path=str(untied_base), adapter=folder / "adapter", output_dir=folder / "merged", verify=False
        )
    )
    return {name: folder / name for name in ("run", "adapter", "merged")}


@pytest.fixture(scope="module")
def pair_run(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on source/target pairs with a source prefix, its export, and its merged checkpoint."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = [{"source": f"the lamp of {name} is red", "target": f"{name}: red"} for name in ("Ada", "Mira", "Otto")]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs * 4)))
    values = {"model_name_or_path": str(untied_base), "data_path": str(folder / "pairs.jsonl")}
    shaped = {"source_prefix": "shorten: ", "conversation_template": "plain", "max_steps": 8, "learning_rate": 2e-2}
    train(TrainSettings(**values, **shaped, output_dir=folder / "run", use_cpu=True, report_samples=0))
    export(ExportSettings(checkpoint=folder / "run", output_dir=folder / "adapter"))
    merge(MergeSettings(model_name_or_path=str(untied_base), adapter=folder / "adapter", output_dir=folder / "merged"))
    return {name: folder / name for name in ("run", "adapter", "merged")}
