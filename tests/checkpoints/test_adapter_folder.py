"""Adapters by their name on the Hugging Face Hub, wherever a command takes an adapter."""

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from t5tune.checkpoints.adapter_folder import find_adapter
from t5tune.progress import Advanced, Event, Finished, Started
from t5tune.runs.checkpoints import read_run_identity
from t5tune.runs.resume_guard import hash_adapter
from tests.support.models.adapters import make_stock_adapter
from tests.support.processes.command_line import CommandResult, t5tune_in_fork
from tests.support.servers.hub import TOKEN, Hub, serve_hub, use_in_this_process

pytestmark = pytest.mark.slow

NAME = "some/adapter"
ASK = ("--prompt", "Hi", "--max-new-tokens", 4, "--use-cpu")
TRAIN = (
    *("--data-path", "pocket", "--num-data", 8, "--use-cpu", "--lora-r", 4, "--lora-alpha", 2000, "--lora-dropout", 0),
    *("--no-train-token-rows", "--add-tokens", "none", "--report-samples", 0),
)


@pytest.fixture(scope="module")
def adapters(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of one base, as stock PEFT writes them."""
    folder = tmp_path_factory.mktemp("adapters")
    return [make_stock_adapter(untied_base, folder / str(rank), r=rank, lora_alpha=2000) for rank in (4, 8)]


@pytest.fixture
def hub(adapters: list[Path], tmp_path: Path) -> Iterator[Hub]:
    """A Hub with both adapters as two commits of one repository, the first one with a tag."""
    with serve_hub(tmp_path / "home") as server:
        repo = server.add("model", NAME, adapters[0])
        repo.tags["v1"] = repo.head
        files = {file.name: file.read_bytes() for file in adapters[1].iterdir()}
        others = {"training_args.bin": b"pickled", "checkpoint-5/adapter_model.safetensors": b"0" * 9}
        server.add("model", NAME, {**files, **others})
        yield server


def run(hub: Hub, *arguments: object) -> CommandResult:
    return t5tune_in_fork(*arguments, env=hub.environment)


def test_chat_uses_the_adapter_of_the_named_revision(hub: Hub, adapters: list[Path], untied_base: Path) -> None:
    replies = [t5tune_in_fork("chat", folder, *ASK).stdout for folder in adapters]
    assert replies[0] != replies[1]
    for name, expected in ((NAME, replies[1]), (f"{NAME}@v1", replies[0])):
        done = run(hub, "chat", name, *ASK)
        assert (done.code, done.stdout) == (0, expected), done.stderr
        assert f"{name.partition('@')[0]} is an adapter; its base is {untied_base}" in done.stderr
        done = run(hub, "chat", untied_base, "--adapter", name, *ASK)
        assert (done.code, done.stdout) == (0, expected), done.stderr


def test_an_adapters_files_are_downloaded_only_once(hub: Hub) -> None:
    first = run(hub, "chat", NAME, *ASK)
    assert first.code == 0, first.stderr
    downloaded = {path.name for path in hub.home.rglob("snapshots/*/**/*") if path.is_symlink()}
    assert downloaded == {"adapter_config.json", "adapter_model.safetensors"}
    again = run(hub, "chat", NAME, *ASK)
    assert again.stdout == first.stdout
    assert hub.count_downloads("adapter_model.safetensors") == 1
    hub.status = 503
    offline = t5tune_in_fork("chat", NAME, *ASK, env=hub.environment | {"HF_HUB_OFFLINE": "1"})
    assert (offline.code, offline.stdout) == (0, first.stdout), offline.stderr


def test_hub_and_local_adapters_give_the_same_results(hub: Hub, adapters: list[Path], tmp_path: Path) -> None:
    made = {}
    for name, adapter in (("folder", adapters[1]), ("hub", NAME)):
        out = tmp_path / name
        out.mkdir()
        common = ("--data-path", "pocket", "--num-data", 3, "--max-new-tokens", 3, "--use-cpu", "--compare-base")
        evaluated = run(hub, "evaluate", adapter, *common, "--output-dir", out / "evaluation", "--json")
        merged = run(hub, "merge", adapter, "--no-verify", "--output-dir", out / "merged")
        exported = run(hub, "export", adapter, "--output-dir", out / "exported")
        assert [done.code for done in (evaluated, merged, exported)] == [0, 0, 0], merged.stderr + exported.stderr
        files = ("evaluation/predictions.jsonl", "merged/model.safetensors", "exported/adapter_model.safetensors")
        made[name] = [evaluated.json["loss"], *((out / file).read_bytes() for file in files)]
    assert made["hub"] == made["folder"]
    commit = hub.repos["model", NAME].head
    card = (tmp_path / "hub" / "merged" / "README.md").read_text()
    assert f"from the adapter `{NAME}@{commit}`" in card
    settings = (tmp_path / "hub" / "merged" / "settings.yaml").read_text()
    assert f"- {NAME}@{commit}" in settings
    assert str(hub.home) not in card + settings


@pytest.mark.long
def test_training_keeps_the_commit_of_a_hub_adapter(
    hub: Hub, adapters: list[Path], untied_base: Path, tmp_path: Path
) -> None:
    common = (*TRAIN, "--model-name-or-path", untied_base, "--max-steps", 2, "--save-steps", 1)
    results = []
    for name, adapter in (("folder", adapters[0]), ("hub", f"{NAME}@v1")):
        done = run(hub, "train", *common, "--adapter", adapter, "--output-dir", tmp_path / name)
        assert done.code == 0, done.stderr
        results.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert results[0] == results[1]
    assert f"adapter: {NAME}@v1" in (tmp_path / "hub" / "settings.yaml").read_text()
    (tmp_path / "hub" / "result.json").unlink()  # as if the run had been killed
    shutil.rmtree(tmp_path / "hub" / "checkpoint-2")
    hub.repos["model", NAME].tags["v1"] = hub.repos["model", NAME].head
    train = ("train", *common, "--adapter", f"{NAME}@v1", "--output-dir", tmp_path / "hub")
    again = run(hub, *train)
    assert again.code == 0, again.stderr
    assert (tmp_path / "hub" / "adapter_model.safetensors").read_bytes() == results[0]
    (tmp_path / "hub" / "result.json").unlink()
    shutil.rmtree(tmp_path / "hub" / "checkpoint-2")
    (tmp_path / "hub" / "run.json").unlink()  # which has the commit: without it, the tag is looked up
    changed = run(hub, *train)
    assert changed.code == 2
    assert 'adapter: "sha256:' in changed.stderr, changed.stderr


def is_close(weights: dict[str, Tensor], files: Mapping[str, bytes]) -> bool:
    """Whether an adapter has the weights of a commit; training with a tiny learning rate may change their last bits."""
    others = load(files["adapter_model.safetensors"])
    return weights.keys() == others.keys() and all(torch.allclose(weights[name], others[name]) for name in weights)


def add_moving_adapter(hub: Hub, adapter: Path) -> None:
    """Add some/moving, which gets a commit with different weights after each lookup."""
    weights, factors = load_file(adapter / "adapter_model.safetensors"), itertools.count(1)
    config = (adapter / "adapter_config.json").read_bytes()

    def add_commit() -> None:
        factor = next(factors)
        scaled = save({name: tensor * factor for name, tensor in weights.items()})
        hub.add("model", "some/moving", {"adapter_config.json": config, "adapter_model.safetensors": scaled})

    add_commit()
    hub.after_lookup = add_commit


def test_a_run_loads_the_commit_that_its_checkpoints_record(
    hub: Hub, adapters: list[Path], untied_base: Path, tmp_path: Path
) -> None:
    add_moving_adapter(hub, adapters[0])
    run_folder = tmp_path / "run"
    model = ("--model-name-or-path", untied_base, "--adapter", "some/moving")
    done = run(hub, "train", *TRAIN, *model, "--max-steps", 1, "--learning-rate", "1e-9", "--output-dir", run_folder)
    assert done.code == 0, done.stderr
    trained = load_file(run_folder / "adapter_model.safetensors")
    used = [commit for commit, files in hub.repos["model", "some/moving"].commits.items() if is_close(trained, files)]
    (snapshot,) = [folder for folder in hub.home.rglob("snapshots/*") if folder.name in used]
    manifest = read_run_identity(run_folder / "checkpoint-1")
    assert manifest["adapter"] == hash_adapter(snapshot)


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.parametrize("is_named_with_its_base", [False, True])
@pytest.mark.variants("True")
def test_all_ranks_of_an_evaluation_load_one_commit(
    is_named_with_its_base: bool, hub: Hub, adapters: list[Path], untied_base: Path, tmp_path: Path
) -> None:
    add_moving_adapter(hub, adapters[0])
    model = ("--model-name-or-path", untied_base, "--adapter", "some/moving") if is_named_with_its_base else ()
    done = run(
        hub,
        *("evaluate", *(model or ["some/moving"]), "--data-path", "pocket", "--num-data", 4, "--max-new-tokens", 2),
        *("--num-processes", 2, "--output-dir", tmp_path / "scores"),
    )
    assert done.code == 0, done.stderr
    assert len(list(hub.home.rglob("snapshots/*"))) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("some/nothing", ["adapter: some/nothing", "no such model on the Hub", "hf auth login"]),
        (f"{NAME}@v9", ["revision: v9", f"{NAME} has no such branch, tag or commit"]),
        ("some/base", ["adapter: some/base", "has no adapter_config.json, so it isn't an adapter"]),
        ("some/empty", ["adapter: some/empty", "no adapter_model.safetensors", "its owner must upload it"]),
        ("some/closed", ["adapter: some/closed", "the Hub asks for a token", "set HF_TOKEN"]),
    ],
)
def test_an_unusable_adapter_is_refused_in_one_line(
    name: str, expected: list[str], hub: Hub, untied_base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    config = (adapters[0] / "adapter_config.json").read_bytes()
    hub.add("model", "some/base", untied_base)
    hub.add("model", "some/empty", {"adapter_config.json": config})
    hub.refusals = {"some/closed": (401, "")}
    out = tmp_path / "out"
    done = run(hub, "merge", "--model-name-or-path", untied_base, "--adapter", name, "--output-dir", out)
    assert done.code == 2, done.stderr
    (error,) = done.errors
    assert [text for text in expected if text not in error] == []
    assert not out.exists()


@pytest.mark.long
def test_a_published_model_is_converted_by_its_name(hub: Hub, untied_base: Path, tmp_path: Path) -> None:
    hub.add("model", "some/base", untied_base)
    done = run(hub, "merge", "some/base", "--to", "onnx", "--output-dir", tmp_path / "web")
    assert done.code == 0, done.stderr
    assert "float32: onnxruntime gives the same reply for 4 of 4 prompts" in done.stderr
    assert (tmp_path / "web" / "index.html").is_file()


def test_the_token_for_a_private_adapter_is_written_nowhere(hub: Hub, adapters: list[Path], tmp_path: Path) -> None:
    hub.add("model", "some/private", adapters[0], private=True)
    out = tmp_path / "merged"
    environment = hub.environment | {"HF_TOKEN": TOKEN}
    done = t5tune_in_fork("merge", "some/private", "--no-verify", "--output-dir", out, "--debug", env=environment)
    assert done.code == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_broken_connection_leaves_no_files(hub: Hub, untied_base: Path, tmp_path: Path) -> None:
    hub.break_after = {"adapter_model.safetensors": 100}
    arguments = ("--model-name-or-path", untied_base, "--adapter", NAME, "--output-dir", tmp_path / "out")
    done = run(hub, "merge", *arguments, "--no-verify")
    assert done.code == 2, done.stderr
    (error,) = done.stderr.splitlines()
    assert f"adapter: {NAME}@" in error
    assert ": no such folder, the connection to the Hub was lost, and the model isn't complete in" in error
    assert not (tmp_path / "out").exists()
    hub.break_after = {}
    assert run(hub, "merge", *arguments, "--no-verify").code == 0


def test_a_folder_with_the_owners_name_hides_no_hub_adapter(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    merge = ("merge", "--no-verify", "--overwrite", "--output-dir", tmp_path / "merged")
    for adapter, error in ((NAME, None), ("some/checkpoint-20", "some/checkpoint-20: no such folder")):
        done = t5tune_in_fork(*merge, adapter, env=hub.environment, cwd=tmp_path)
        assert done.code == (0 if error is None else 2), done.stderr
        assert error is None or error in done.errors[0]


def test_pickled_weights_are_refused_online_and_offline(hub: Hub, adapters: list[Path], tmp_path: Path) -> None:
    config = (adapters[0] / "adapter_config.json").read_bytes()
    hub.add("model", "some/pickled", {"adapter_config.json": config, "adapter_model.bin": b"x"})
    for offline in ("0", "1"):
        environment = {**hub.environment, "HF_HUB_OFFLINE": offline}
        done = t5tune_in_fork("merge", "some/pickled", "--output-dir", tmp_path / "merged", env=environment)
        assert done.code == 2
        assert "pickled files aren't downloaded; if you trust its owner, run `hf download" in done.errors[0]


def test_chat_finds_the_base_of_a_hub_adapter(
    hub: Hub, adapters: list[Path], untied_base: Path, tmp_path: Path
) -> None:
    hub.add("model", "some/t5", untied_base)
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    files = {file.name: file.read_bytes() for file in adapters[0].iterdir()}
    files["adapter_config.json"] = json.dumps({**config, "base_model_name_or_path": "some/t5"}).encode()
    hub.add("model", "some/other", files)
    done = run(hub, "chat", "some/other", *ASK)
    assert (done.code, done.stdout) == (0, t5tune_in_fork("chat", adapters[0], *ASK).stdout), done.stderr


def test_a_download_reports_its_progress_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_this_process(hub, monkeypatch)
    events: list[Event] = []
    folder = find_adapter(Path(NAME), tmp_path / "cache", report=events.append)
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert events[0] == Started("download", size, "bytes")
    assert events[-2:] == [Advanced("download", size), Finished("download")]
    events.clear()
    assert find_adapter(Path(NAME), tmp_path / "cache", report=events.append) == folder
    assert events == []
