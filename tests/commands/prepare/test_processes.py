"""prepare: several workers, memory, and kills."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from t5tune.commands.prepare import prepare
from t5tune.errors import DataError
from t5tune.settings import PrepareSettings
from tests.commands.prepare.ids import Prepared, record
from tests.support.processes.forks import ForkServer


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 records, of which 30 are rejected."""
    rng = random.Random(5)
    path = tmp_path_factory.mktemp("many") / "data.jsonl"
    words = ["lamp", "table", "é", "猫", "{", "}", "\\n", "one", "two", "three"]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(1500):
            text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 60)))
            file.write(json.dumps({"text": text} if number % 50 == 7 else record(text, text[::-1], text, "Yes")) + "\n")
    return path


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(many: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        settings = PrepareSettings(
            model_name_or_path="pocket", data_path=str(many), output_dir=tmp_path / str(workers), num_workers=workers
        )
        assert prepare(settings).conversations == 1470
    one = bytes_of(tmp_path / "1")
    assert len(one) >= 6
    assert bytes_of(tmp_path / "2") == one
    assert bytes_of(tmp_path / "3") == one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "message"),
    [(", {'a': 1}]", "record 1500: not valid JSON"), ("", "the array has no end")],
    ids=["in a worker", "while reading"],
)
def test_an_error_with_several_workers_leaves_no_files(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, message: str
) -> None:
    monkeypatch.setattr("t5tune.preparing.sample.SAMPLE_BYTES", 1000)  # the sample ends before the error
    broken = tmp_path / "broken.json"
    broken.write_text("[" + ",".join(many.read_text().splitlines()) + end)
    with pytest.raises(DataError, match=rf"broken\.json:1: {message}"):
        prepare(
            PrepareSettings(
                model_name_or_path="pocket", data_path=str(broken), output_dir=tmp_path / "cache", num_workers=2
            )
        )
    assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]


MEASURED = """
import sys
from pathlib import Path
from t5tune.commands.prepare import prepare
from t5tune.settings import PrepareSettings
prepare(PrepareSettings(model_name_or_path="pocket", data_path=sys.argv[1], output_dir=sys.argv[2], num_workers=1))
heavy = sorted({"torch", "transformers"} & set(sys.modules))
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], *heavy)
"""


@pytest.mark.long
@pytest.mark.slow
def test_memory_is_constant_and_torch_is_not_imported(many: Path, tmp_path: Path) -> None:
    lines = many.read_bytes()
    peaks = []
    for times in (1, 30):
        data = tmp_path / f"{times}.jsonl"
        data.write_bytes(lines * times)
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, data, tmp_path / f"cache-{times}"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        peak, *heavy = done.stdout.split()
        assert heavy == []
        peaks.append(int(peak) / 1024)
    assert peaks[1] < peaks[0] + 40  # the second input is 13 MB times 30
    assert peaks[1] < 250


@pytest.mark.long
@pytest.mark.slow
def test_a_kill_leaves_the_old_or_new_cache_or_none(tmp_path: Path, fork_server: ForkServer) -> None:
    """Kill prepare whenever it opens, renames or removes a file next to its output."""
    place = tmp_path / "place"
    place.mkdir()
    for name in ("old", "new"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record("Hi", name)) + "\n")

    def run(name: str, *calls: str) -> int:
        data, cache = tmp_path / f"{name}.jsonl", place / "cache"
        flags = ["--model-name-or-path=pocket", f"--data-path={data}", f"--output-dir={cache}"]
        return fork_server.run(["prepare", *flags], calls=calls).codes[0]

    def run_until(moment: int) -> int:
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "before", place)
        return run("new", f"tests.support.ranks.faults:kill_after({str(place)!r}, {moment})")

    assert run("old") == 0
    before = bytes_of(place / "cache")
    shutil.copytree(place, tmp_path / "before")
    assert run("new") == 0
    after = bytes_of(place / "cache")
    assert before != after
    states: list[str] = []
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        code = run_until(len(states) + 1)
        found = bytes_of(place / "cache") if (place / "cache").exists() else None
        assert found in (before, after, None)
        states.append({str(before): "old", str(after): "new"}.get(str(found), "none"))
    assert code == 0
    assert len(states) > 20
    assert states == sorted(states, key=["old", "none", "new"].index)
    assert {"old", "new"} <= set(states[:-1])
    for moment in (len(states) // 2, len(states) - 1):  # leftover files don't disturb the next run
        assert run_until(moment) == -signal.SIGKILL
        assert run("new") == 0
        assert bytes_of(place / "cache") == after


def test_only_folders_of_killed_processes_are_removed(prepared: Prepared, tmp_path: Path) -> None:
    abandoned, used = tmp_path / ".cache.new-abandoned", tmp_path / ".cache.new-used"
    for folder in (abandoned, used):
        folder.mkdir()
        (folder / "mixture.json").write_text("half")
    lock = os.open(used, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    prepared(record("Hi", "Yes"), base=Path("pocket"))
    os.close(lock)
    assert (abandoned.exists(), used.exists()) == (False, True)
    abandoned.mkdir()
    assert prepared(record("Hi", "Yes"), base=Path("pocket"))[0].up_to_date
    assert not abandoned.exists()
