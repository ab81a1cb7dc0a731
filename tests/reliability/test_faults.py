"""Whatever the system refuses, there is a line that says so, the sealed checkpoints stay, and the run goes on."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from t5tune.data.cache import open_cache
from t5tune.io.atomic import sha256
from t5tune.training.metrics_log import read_journal
from tests.support.forks import FROM_THEN_ON, ONCE, SHORT, Forks, Thing
from tests.support.runs import LONG, arguments, whole_steps

KINDS = {
    "one process": (1, ()),
    "zero3": (2, ("--deepspeed=zero3", "--process-group-timeout=60", "--report-samples=0")),
}
NO_FAULTS = "faults are injected on Linux by a library that a C compiler makes, and there is none here"
SHORT_RUN = ("--max-steps=4", "--save-steps=2", "--logging-steps=1")
SAMPLE = {"once": 1, "from then on": 3, "short": 2}  # faults of each way in `make test`
WAYS = {
    "once": (ONCE, errno.EIO),
    "from then on": (FROM_THEN_ON, errno.ENOSPC),
    "short": (SHORT, 0),
}


@pytest.fixture(scope="module")
def few(conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six conversations."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("\n".join(conversations.read_text().splitlines()[:6]) + "\n")
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS if LONG else ["one process"])
@pytest.mark.timeout(14400)
def test_a_run_outlives_whatever_cannot_be_written(
    kind: str, way: str, forks: Forks, untied_base: Path, few: Path, tmp_path: Path
) -> None:
    if not forks.has_faults:
        pytest.skip(NO_FAULTS)
    ranks, more = KINDS[kind]
    run = tmp_path / "run"
    command = arguments(untied_base, few, run, *SHORT_RUN, *more)
    undisturbed = forks.run(command, ranks, under=run)
    assert undisturbed.codes == [0] * ranks, undisturbed.log
    expected, things = results(run), undisturbed.things
    assert [thing.kind for thing in things].count("fsync") > 30
    for at in chosen(things, way):
        outlive(forks, command, ranks, run, at, way, expected)


def outlive(
    forks: Forks, command: list[str], ranks: int, run: Path, at: int, way: str, expected: dict[str, str]
) -> None:
    """Begin anew, fail at the `at`th thing, look at what is left and told, and go on to the expected results."""
    shutil.rmtree(run)
    mode, error = WAYS[way]
    done = forks.run(command, ranks, under=run, at=at, mode=mode, error=error)
    failed = done.things[at - 1]
    where = f"{at}: {failed}\n{done.codes}\n{done.log}"
    assert set(sealed(done.things[: at - 1], run)) <= set(whole_steps(run)), where
    assert "Traceback" not in done.log, where
    if way == "short":
        assert done.codes == [0] * ranks, where
    elif way == "once" and failed.path == str(run / "metrics.jsonl"):
        assert done.codes == [0] * ranks, where
        assert f"warning: {run / 'metrics.jsonl'}: {os.strerror(error)}" in done.log, where
        assert [line["step"] for line in read_journal(run)] == [1, 2, 3, 4], where
    elif done.codes == [0] * ranks:
        # a folder that is there, or a copy that began anew; no copy is what torch saves
        is_copied = failed.kind == "write" and not failed.path.endswith(".pt")
        assert failed.kind == "mkdir" or (is_copied and way == "once"), where
    else:
        told = [line for line in done.log.splitlines() if line.startswith("error: ")]
        assert 1 in done.codes, where
        assert all(code in (0, 1) for code in done.codes), where
        assert 1 <= len(told) <= ranks, where
        assert any(os.strerror(error) in line and str(run) in line for line in told), where
        done = forks.run(command, ranks, under=run)
        assert done.codes == [0] * ranks, f"{where}\nand then\n{done.log}"
    assert results(run) == expected, where
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == [], where


def test_prepare_leaves_the_old_cache_or_the_new_whatever_cannot_be_written(
    forks: Forks, few: Path, conversations: Path, tmp_path: Path
) -> None:
    if not forks.has_faults:
        pytest.skip(NO_FAULTS)
    place = tmp_path / "place"

    def command(data: Path) -> list[str]:
        return ["prepare", "--model-name-or-path=pocket", f"--data-path={data}", f"--output-dir={place / 'cache'}"]

    assert forks.run(command(few)).codes == [0]
    shutil.copytree(place, tmp_path / "before")
    undisturbed = forks.run(command(conversations), under=place)
    for way in WAYS:
        mode, error = WAYS[way]
        for at in chosen(undisturbed.things, way):
            shutil.rmtree(place)
            shutil.copytree(tmp_path / "before", place)
            done = forks.run(command(conversations), under=place, at=at, mode=mode, error=error)
            where = f"{way}, {at} of {len(undisturbed.things)}: {done.things[at - 1]}\n{done.codes}\n{done.log}"
            if way == "short":
                assert done.codes == [0], where
            elif done.codes == [0]:
                # it is there; folders that can't be exchanged are renamed one after the other
                harmless = [Thing("mkdir", str(place)), Thing("rename", str(place / "cache"))]
                assert done.things[at - 1] in harmless, where
            else:
                assert done.codes == [1], where
                (told,) = [line for line in done.log.splitlines() if line.startswith("error: ")]
                assert str(place) in told, where
                assert os.strerror(error) in told, where
            assert "Traceback" not in done.log, where
            assert open_cache(place / "cache").manifest["inputs"]["data"][0]["file"] in (few.name, conversations.name)
            assert forks.run(command(conversations)).codes == [0], where
            assert [path.name for path in place.iterdir()] == ["cache"], where


def results(run: Path) -> dict[str, str]:
    """The hashes of what a finished run is for."""
    assert (run / "result.json").is_file()
    names = ("adapter_", "tokenizer", "template")
    return {path.name: sha256(path) for path in run.iterdir() if path.name.startswith(names)}


def chosen(things: list[Thing], way: str) -> list[int]:
    """The numbers of the things that fail: all of them, or a sample that holds some of each kind."""
    numbers = [number for number, thing in enumerate(things, 1) if way != "short" or thing.kind == "write"]
    if LONG:
        return numbers
    last = {thing.kind: number for number, thing in enumerate(things, 1)} if way == "once" else {}
    saves = [n for n, thing in enumerate(things, 1) if thing.kind == "write" and thing.path.endswith("optimizer.pt")]
    inside = saves[len(saves) // 2 :][:1] if way == "once" else []
    return sorted({*numbers[len(way) :: -(-len(numbers) // SAMPLE[way])], *last.values(), *inside})


def sealed(things: list[Thing], run: Path) -> list[int]:
    """The steps of the checkpoints that were renamed into place."""
    names = [re.fullmatch(rf"{re.escape(str(run))}/checkpoint-(\d+)", thing.path) for thing in things]
    return [int(name[1]) for name, thing in zip(names, things, strict=True) if name and thing.kind == "rename"]
