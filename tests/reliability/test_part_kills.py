"""kill -9 of a process that prepares a part, or joins the parts: the same command again, or --join, completes all."""

import json
import shutil
from pathlib import Path

import pytest

from t5tune.commands.prepare import prepare
from t5tune.settings import PrepareSettings
from tests.support.processes.forks import ForkServer

pytestmark = pytest.mark.slow

MOMENTS = {
    "the part is begun": ("os.mkdir", ".part-1-of-2.new"),
    "the part is written": ("open", "part.json"),
    "the part is complete": ("os.rename", "part-1-of-2"),
    "the join begins": ("open", "part-0-of-2/data.records"),
    "the folder is written": ("open", "mixture.json.new"),
    "the cache is complete": ("os.rename", ".part-0-of-2.old"),
    "the parts are deleted": ("shutil.rmtree", ".part-0-of-2.old"),
    "some parts are deleted": ("shutil.rmtree", ".part-1-of-2.old"),
}


def make_settings(folder: Path, **values: object) -> PrepareSettings:
    data = str(folder.parent / "data.jsonl")
    return PrepareSettings(
        model_name_or_path="pocket", data_path=data, output_dir=folder / "cache", num_workers=1, **values
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """The cache of one process. The first part of two is complete in the folder `before`."""
    lines = [json.dumps({"source": f"q {number}", "target": f"a {number % 9}"}) for number in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    prepare(make_settings(tmp_path / "one", dedupe="exact"))
    prepare(make_settings(tmp_path / "before", dedupe="exact", shard="0/2"))
    return bytes_of(tmp_path / "one" / "cache")


def check_completion(folder: Path, expected: dict[str, bytes], by_join: bool) -> None:
    """Check that the same command, or --join if all parts are complete, makes the cache.

    The folder that a killed process was writing may be another machine's. An ordinary prepare deletes it.
    """
    prepare(make_settings(folder, dedupe="exact", **({"join": True} if by_join else {"shard": "1/2"})))
    assert bytes_of(folder / "cache") == expected
    assert {path.name.partition(".new-")[0] for path in folder.iterdir()} <= {"cache", ".cache"}
    prepare(make_settings(folder, dedupe="exact"))
    assert bytes_of(folder / "cache") == expected
    assert [path.name for path in folder.iterdir()] == ["cache"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_part_or_a_join_that_was_killed_is_completed(
    moment: str, tmp_path: Path, expected: dict[str, bytes], fork_server: ForkServer
) -> None:
    folder = tmp_path / "place"
    shutil.copytree(tmp_path / "before", folder)
    flags = [*base_flags(folder), "--shard=1/2"]
    done = fork_server.run(flags, calls=[f"tests.support.ranks.faults:kill_at{MOMENTS[moment]!r}"])
    assert done.codes != [0], done.log
    is_encoded = list(MOMENTS).index(moment) > list(MOMENTS).index("the part is complete")
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    check_completion(again, expected, by_join=False)
    if is_encoded:
        check_completion(folder, expected, by_join=True)


@pytest.mark.parametrize("moment", ["the part is written", "the join begins", "the parts are deleted"])
@pytest.mark.parametrize("lock", ["lock_as_on_nfs", "lock_nothing"])
def test_parts_restarted_together_after_a_kill_leave_one_cache(
    moment: str, lock: str, tmp_path: Path, expected: dict[str, bytes], fork_server: ForkServer
) -> None:
    folder, call = tmp_path / "place", f"tests.support.processes.nfs:{lock}()"
    shutil.copytree(tmp_path / "before", folder)
    killed = fork_server.run(
        [*base_flags(folder), "--shard=1/2"], calls=[call, f"tests.support.ranks.faults:kill_at{MOMENTS[moment]!r}"]
    )
    assert killed.codes != [0], killed.log
    done = fork_server.run([*base_flags(folder), "--shard=auto"], ranks=2, calls=[call])
    assert done.codes == [0, 0], done.log
    assert bytes_of(folder / "cache") == expected


@pytest.mark.long
def test_a_kill_at_any_moment_is_survived(tmp_path: Path, expected: dict[str, bytes], fork_server: ForkServer) -> None:
    number, codes = 0, [1]
    while codes != [0]:
        number += 1
        folder = tmp_path / f"place-{number}"
        shutil.copytree(tmp_path / "before", folder)
        call = f"tests.support.ranks.faults:kill_after({str(folder)!r}, {number})"
        codes = fork_server.run([*base_flags(folder), "--shard=1/2"], calls=[call]).codes
        check_completion(folder, expected, by_join=False)
        shutil.rmtree(folder)
    assert number > 50


def base_flags(folder: Path) -> list[str]:
    values = make_settings(folder, dedupe="exact").model_dump(exclude_unset=True, mode="json")
    values["data_path"] = values["data_path"][0]
    return ["prepare", *(f"--{name.replace('_', '-')}={value}" for name, value in values.items())]
