"""What the tests of the server share: models that are served, and servers of this process."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from t5tune.commands.export import export
from t5tune.commands.merge import merge
from t5tune.commands.serve import Server, serve
from t5tune.commands.train import train
from t5tune.progress import Event, silent
from t5tune.settings import ExportSettings, MergeSettings, ServeSettings, TrainSettings
from tests.serving.adapter_folders import scale_adapter

pytest.importorskip("starlette", reason="the extra `serve` isn't installed")

StartServer = Callable[..., Server]


def train_briefly(base: Path, data: Path, folder: Path, **changes: Any) -> dict[str, Path]:
    """Train a run on a base, and make an adapter and a merged checkpoint of it."""
    train(
        TrainSettings(
            model_name_or_path=str(base), data_path=str(data), output_dir=folder / "run", max_steps=8,
            learning_rate=2e-2, use_cpu=True, report_samples=0, **changes,
        )
    )  # fmt: skip
    export(ExportSettings(checkpoint=folder / "run", output_dir=folder / "adapter"))
    merge(MergeSettings(adapter=[folder / "adapter"], output_dir=folder / "merged", verify=False))
    return {"base": base} | {name: folder / name for name in ("run", "adapter", "merged")}


@pytest.fixture(scope="session")
def chats(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of conversations: base, run, adapter and merged checkpoint."""
    return train_briefly(untied_base, conversations, tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="session")
def pairs(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of single exchanges with a prefix."""
    folder = tmp_path_factory.mktemp("pairs")
    records = [{"source": f"the lamp of {name} is red", "target": f"{name}: red"} for name in ("Ada", "Mira", "Otto")]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records * 4)))
    return train_briefly(
        untied_base, folder / "pairs.jsonl", folder, source_prefix="shorten: ", conversation_template="plain"
    )


@pytest.fixture
def adapters(chats: dict[str, Path], tmp_path: Path) -> list[Path]:
    """Three adapters with different replies."""
    return [scale_adapter(chats["adapter"], tmp_path / str(scale), scale) for scale in (1.0, -1.0, 3.0)]


@pytest.fixture(scope="session")
def converted_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversions that all tests share, since each takes seconds."""
    return tmp_path_factory.mktemp("converted")


@pytest.fixture
def settings(converted_dir: Path) -> Callable[..., ServeSettings]:
    def make_settings(models: dict[str, Path], **changes: Any) -> ServeSettings:
        values: dict[str, Any] = {"port": 0, "use_cpu": True, "max_new_tokens": 8, "engine": "transformers"}
        values |= {"models": {name: str(folder) for name, folder in models.items()}, "converted_dir": converted_dir}
        return ServeSettings(**values | changes)

    return make_settings


@pytest.fixture(scope="module")
def start(converted_dir: Path) -> Iterator[StartServer]:
    """A function that starts a server in this process. It stops at the end of the module."""
    with ExitStack() as servers:

        def start_server(models: Any, report: Callable[[Event], None] = silent, **changes: Any) -> Server:
            values = {"port": 0, "use_cpu": True, "max_new_tokens": 12, "converted_dir": converted_dir} | changes
            return servers.enter_context(serve(ServeSettings(models=models, **values), report))

        yield start_server
