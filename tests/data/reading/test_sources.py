"""Datasets on the Hugging Face Hub."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import hf_hub_download, snapshot_download

from t5tune.data.reading.sources import bring_data, is_dataset_name
from t5tune.errors import DataError
from t5tune.hub.datasets import DatasetChoice
from tests.data.reading.remote_data import expect, make_records, prepare, read_sources, to_jsonl
from tests.support.caches import find_cache
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.servers.hub import TOKEN, Hub, serve_hub, use_in_this_process

pytestmark = pytest.mark.slow

NAME = "some/chats"


def to_parquet(*numbers: int) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(make_records(*numbers)), sink)
    return bytes(sink.getvalue())


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve_hub(tmp_path / "home") as server:
        yield server


CONFIGS = b"""---
configs:
- config_name: small
  default: true
  data_files:
  - split: train
    path: small/tr-*.parquet
  - split: test
    path: [small/te.parquet]
- config_name: large
  data_dir: large
- config_name: odd
  data_files: extra/**/*.jsonl.gz
---
# Chats
"""
FILES = {
    "README.md": CONFIGS,
    "small/tr-0.parquet": to_parquet(1, 2),
    "small/tr-1.parquet": to_parquet(3),
    "small/te.parquet": to_parquet(4),
    "large/train.csv": b"source,target\nWhat is 5 plus one?,It is 6.\n",
    "large/validation.csv": b"source,target\nWhat is 6 plus one?,It is 7.\n",
    "extra/deep/er/x.jsonl.gz": gzip.compress(to_jsonl(7), mtime=0),
    "chats.py": b"raise SystemExit('a script was run')",
}


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        (NAME, (), expect(1, 2, 3)),
        (f"hf://datasets/{NAME}", ("--data-split", "test"), expect(4)),
        (NAME, ("--data-subset", "large"), expect(5)),
        (NAME, ("--data-subset", "large", "--data-split", "validation"), expect(6)),
        (NAME, ("--data-subset", "odd"), expect(7)),
        (f"{NAME}@v1", (), expect(9)),
        (f"hf://datasets/{NAME}/small", (), expect(4, 1, 2, 3)),
        (f"hf://datasets/{NAME}@main/small/tr-*.parquet", (), expect(1, 2, 3)),
        (f"hf://datasets/{NAME}/extra/deep/er/x.jsonl.gz", (), expect(7)),
        (f"hf://datasets/{NAME}@refs/pr/3/data.jsonl", (), expect(9)),
        (f"hf://datasets/{NAME}@refs/convert/a-b", (), expect(9)),
        (f"hf://datasets/{NAME}@feature%2Fx", (), expect(9)),
        (f"{NAME}@feature/x", (), expect(9)),
        (f"hf://datasets/{NAME}/odd[1].jsonl", (), expect(8)),
    ],
)
def test_the_records_of_a_subset_and_a_split_are_read(
    name: str, flags: tuple[str, ...], expected: list[str], hub: Hub, tmp_path: Path
) -> None:
    repo = hub.add("dataset", NAME, {"data.jsonl": to_jsonl(9)})
    repo.tags |= dict.fromkeys(("v1", "refs/pr/3", "refs/convert/a-b", "feature/x"), repo.head)
    hub.add("dataset", NAME, {**FILES, "odd[1].jsonl": to_jsonl(8)})
    done = prepare(hub, name, tmp_path / "cache", *flags)
    assert done.code == 0, done.stderr
    assert read_sources(tmp_path / "cache") == expected


@pytest.mark.parametrize(
    ("files", "flags", "expected", "note"),
    [
        (["data/train-0-of-2.parquet", "data/train-1-of-2.parquet", "data/test-0.parquet"], (), [0, 1], ""),
        (["train_v2/test-0.jsonl", "train_v2/train-0.jsonl"], (), [1], ""),
        (["a.parquet", "b.parquet"], (), [0, 1], ""),
        (["my_training_set.parquet", "my_dev_set.parquet"], ("--data-split", "validation"), [1], ""),
        (["constraint/a.parquet", "dev/a.parquet"], (), [0], ""),  # no word `train` in it, but no other split either
        (["test.parquet"], (), [0], "reading its only split, test"),
        (["en/train.parquet", "de/train.parquet"], ("--data-subset", "de"), [1], ""),
        (["train.parquet", "train.jsonl", "train-2.parquet"], (), [0, 2], "skipped, since most files are .parquet"),
    ],
)
def test_file_names_determine_the_splits_without_a_list_of_subsets(
    files: list[str], flags: tuple[str, ...], expected: list[int], note: str, hub: Hub, tmp_path: Path
) -> None:
    make = {".parquet": to_parquet, ".jsonl": to_jsonl}
    hub.add("dataset", NAME, {name: make[Path(name).suffix](number) for number, name in enumerate(files)})
    done = prepare(hub, NAME, tmp_path / "cache", *flags)
    assert done.code == 0, done.stderr
    assert sorted(read_sources(tmp_path / "cache")) == expect(*expected)
    assert note in done.stderr


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("some/nothing", (), ["data_path: some/nothing", "no such dataset on the Hub", "hf auth login"]),
        ("some/gated", (), ["data_path: some/gated", "access to this dataset is restricted"]),
        (f"{NAME}@v9", (), ["revision: v9", "no such branch, tag or commit"]),
        (NAME, ("--data-subset", "huge"), ["data_subset: huge", "no such subset", "small, large, odd"]),
        (NAME, ("--data-split", "dev"), ["data_split: dev", "no such split", "it has train, test"]),
        (f"hf://datasets/{NAME}/small/x*", (), ["no such data file in this dataset", "small/te.parquet"]),
        ("hf://datasets/alone", (), ["not the name of a dataset", "hf://datasets/owner/name"]),
        ("some/script", (), ["needs its Python script", "hf://datasets/some/script@refs/convert/parquet"]),
        ("some/text", (), ["no JSON, JSONL, CSV or Parquet file", "it has a.txt"]),
        ("some/empty", (), ["no JSON, JSONL, CSV or Parquet file", "it has no files"]),
        ("some/two", (), ["2 subsets and no default", "--data-subset: en, de"]),
        ("pocket", ("--data-split", "test"), ["data_split: test", "only for a whole dataset on the Hub"]),
        (f"hf://datasets/{NAME}/small", ("--data-subset", "large"), ["data_subset: large", "leave it out"]),
    ],
)
def test_a_missing_dataset_is_refused_in_one_line(
    name: str, flags: tuple[str, ...], expected: list[str], hub: Hub, tmp_path: Path
) -> None:
    hub.add("dataset", NAME, FILES)
    hub.add("dataset", "some/script", {"script.py": b""})
    hub.add("dataset", "some/text", {"a.txt": b""})
    hub.add("dataset", "some/empty", {})
    two = b"---\nconfigs:\n- {config_name: en, data_files: a.jsonl}\n- {config_name: de, data_files: b.jsonl}\n---\n"
    hub.add("dataset", "some/two", {"README.md": two, "a.jsonl": to_jsonl(1), "b.jsonl": to_jsonl(2)})
    hub.refusals = {"some/gated": (403, "GatedRepo")}
    done = prepare(hub, name, tmp_path / "cache", *flags)
    assert done.code == 2, done.stderr
    (error,) = done.errors
    assert [text for text in expected if text not in error] == []
    assert not (tmp_path / "cache").exists()


def test_a_hub_dataset_gives_the_bytes_of_local_files(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add("dataset", NAME, {"data/train-0.jsonl": to_jsonl(*range(20)), "data/train-1.jsonl": to_jsonl(20)})
    for name, body in repo.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(body)
    assert prepare(hub, NAME, tmp_path / "a").code == 0
    assert prepare(None, str(tmp_path / "data"), tmp_path / "b").code == 0
    manifests = [json.loads((find_cache(tmp_path / name) / "manifest.json").read_text()) for name in "ab"]
    origin = f"hf://datasets/{NAME}@{repo.head}/data"
    assert manifests[0].pop("sources") == [f"{origin}/train-0.jsonl", f"{origin}/train-1.jsonl"]
    assert manifests[0] == manifests[1]
    for name in ("tokens.bin", "conversations.bin", "examples.bin"):
        one, other = (find_cache(tmp_path / folder) / name for folder in "ab")
        assert one.read_bytes() == other.read_bytes()
    again = prepare(hub, NAME, tmp_path / "a", "--json")
    assert again.json["up_to_date"] is True
    assert hub.count_downloads("train-0.jsonl") == 1


def test_a_cached_dataset_is_read_offline_as_a_whole(hub: Hub, tmp_path: Path) -> None:
    names = [f"train-{number}-of-3.jsonl" for number in range(3)]
    hub.add("dataset", NAME, {name: to_jsonl(number) for number, name in enumerate(names)})
    offline = {"HF_HUB_OFFLINE": "1"}
    hub.break_after = {names[2]: 5}
    broken = prepare(hub, NAME, tmp_path / "cache")
    assert broken.code == 2
    assert broken.stderr.splitlines() == broken.errors
    assert not (tmp_path / "cache").exists()
    incomplete = prepare(hub, NAME, tmp_path / "cache", **offline)
    assert incomplete.code == 2, incomplete.stderr
    assert "in the local cache" in incomplete.errors[0]
    hub.break_after = {}
    assert prepare(hub, NAME, tmp_path / "cache").code == 0
    done = prepare(hub, NAME, tmp_path / "again", **offline)
    assert done.code == 0, done.stderr
    assert read_sources(tmp_path / "again") == expect(0, 1, 2)


def test_hugging_face_s_downloads_are_read_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("dataset", NAME, {"train.jsonl": to_jsonl(1), "test.jsonl": to_jsonl(2)})
    use_in_this_process(hub, monkeypatch)
    snapshot_download(NAME, repo_type="dataset")
    hub.status = 503
    done = prepare(hub, NAME, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert done.code == 0, done.stderr
    assert read_sources(tmp_path / "cache") == expect(1)
    # after the download of a single file, huggingface_hub doesn't know whether the dataset has more files
    hub.status = None
    hub.add("dataset", "some/more", {"train-0.jsonl": to_jsonl(1), "train-1.jsonl": to_jsonl(2)})
    hf_hub_download("some/more", "train-0.jsonl", repo_type="dataset")
    done = prepare(hub, "some/more", tmp_path / "more", HF_HUB_OFFLINE="1")
    assert done.code == 2
    assert "HF_HUB_OFFLINE disables downloads, and the dataset isn't complete in the local cache" in done.errors[0]


def test_a_missing_split_isn_t_replaced_offline(hub: Hub, tmp_path: Path) -> None:
    hub.add("dataset", NAME, {"train.jsonl": to_jsonl(1), "validation.jsonl": to_jsonl(2)})
    assert prepare(hub, NAME, tmp_path / "cache", "--data-split", "validation").code == 0
    done = prepare(hub, NAME, tmp_path / "again", HF_HUB_OFFLINE="1")
    assert done.code == 2, done.stderr
    assert "in the local cache" in done.errors[0]


def test_folders_with_splits_are_subsets(hub: Hub, tmp_path: Path) -> None:
    names = ("en/train/0.jsonl", "en/test/0.jsonl", "de/train/0.jsonl", "de/test/0.jsonl")
    hub.add("dataset", NAME, {name: to_jsonl(number) for number, name in enumerate(names)})
    done = prepare(hub, NAME, tmp_path / "cache")
    assert done.code == 2, done.stderr
    assert "several folders of this dataset have splits; choose one with --data-subset: de, en" in done.errors[0]
    assert prepare(hub, NAME, tmp_path / "cache", "--data-subset", "de", "--data-split", "test").code == 0
    assert read_sources(tmp_path / "cache") == expect(3)


def test_a_private_dataset_s_token_is_written_nowhere(hub: Hub, tmp_path: Path) -> None:
    hub.add("dataset", NAME, {"data.jsonl": to_jsonl(1)}, private=True)
    refused = prepare(hub, NAME, tmp_path / "cache")
    assert (refused.code, "or a private one" in refused.errors[0]) == (2, True)
    done = prepare(hub, NAME, tmp_path / "cache", "--debug", HF_TOKEN=TOKEN)
    assert done.code == 0, done.stderr
    assert TOKEN not in done.stderr + done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_run_trains_on_one_split_and_evaluates_on_another(hub: Hub, untied_base: Path, tmp_path: Path) -> None:
    files = {"train.jsonl": to_jsonl(*range(8)), "validation.jsonl": to_jsonl(8), "test.jsonl": to_jsonl(9, 10)}
    repo = hub.add("dataset", NAME, files)
    common = (
        *("--model-name-or-path", untied_base, "--data-path", NAME, "--eval-data-path", NAME, "--max-steps", 1),
        *("--use-cpu", "--report-samples", 0),
    )
    for flags, expected in (((), expect(8)), (("--eval-data-split", "test"), expect(9, 10))):
        run = tmp_path / str(len(expected))
        done = t5tune_in_fork("train", *common, *flags, "--output-dir", run, env=hub.environment)
        assert done.code == 0, done.stderr
        assert read_sources(run / "data") == expect(*range(8))
        assert read_sources(run / "eval-data") == expected
        card = (run / "README.md").read_text()
        assert f"from hf://datasets/{NAME}@{repo.head}/train.jsonl" in card
    raw_text = ("--objective", "span-corruption", "--source-column", "source")
    for flags, count in (((), 1), (raw_text, 1), ((*raw_text, "--data-split", "test"), 2)):
        evaluated = t5tune_in_fork(
            *("evaluate", run, "--data-path", NAME, *flags, "--overwrite", "--output-dir", tmp_path / "out"),
            *("--use-cpu", "--json", "--max-new-tokens", 1),
            env=hub.environment,
        )
        assert evaluated.json["examples"] == count, evaluated.stderr


def test_evaluation_datasets_use_the_training_subset(hub: Hub, untied_base: Path, tmp_path: Path) -> None:
    hub.add("dataset", NAME, FILES)
    (tmp_path / "own.jsonl").write_bytes(to_jsonl(9))
    config = tmp_path / "run.yaml"
    evaluated = [{"path": NAME}, {"path": str(tmp_path / "own.jsonl")}, {"path": NAME, "data_subset": None}]
    config.write_text(json.dumps({"data_path": NAME, "data_subset": "large", "eval_data": evaluated}))
    done = t5tune_in_fork(
        *("train", "--config", config, "--model-name-or-path", untied_base, "--output-dir", tmp_path / "run"),
        *("--max-steps", 1, "--use-cpu", "--report-samples", 0),
        env=hub.environment,
    )
    assert done.code == 0, done.stderr
    assert read_sources(tmp_path / "run" / "data") == expect(5)
    found = {name: read_sources(tmp_path / "run" / "eval-data" / name) for name in ("chats", "own", "chats-2")}
    assert found == {"chats": expect(6), "own": expect(9), "chats-2": expect(4)}


def test_only_names_that_are_not_here_are_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert all(map(is_dataset_name, ("owner/name", "hf://datasets/here/name")))
    # here/name is most likely a mistake in the name of a file
    assert not any(map(is_dataset_name, ("here/name", "owner/name.jsonl", "chats.jsonl", "a/b/c", "-")))


def test_a_broken_readme_counts_as_none(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_this_process(hub, monkeypatch)
    for number, readme in enumerate((b"---\nconfigs: [\n---\n", b"\xff\xfe", b"---\nconfigs: 3\n---\n", b"no header")):
        name = f"some/broken{number}"
        hub.add("dataset", name, {"README.md": readme, "train.jsonl": to_jsonl(number), "test.jsonl": b""})
        (path,) = bring_data([name], DatasetChoice(), "data_path", tmp_path / "cache")
        assert Path(path).read_bytes() == to_jsonl(number)


def test_an_untrusted_dataset_can_t_name_local_files(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_in_this_process(hub, monkeypatch)
    readme = b"---\nconfigs:\n- config_name: x\n  data_files: ../../../../../../etc/*.json\n  data_dir: /etc\n---\n"
    hub.add("dataset", NAME, {"README.md": readme, "train.jsonl": to_jsonl(1)})
    with pytest.raises(DataError, match="no such split"):
        bring_data([NAME], DatasetChoice(), "data_path", tmp_path / "cache")
