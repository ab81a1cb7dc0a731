"""What `t5tune prepare --shard` prints: the cache's path once it is there, and before that what is missing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes.command_line import CommandResult

pytestmark = pytest.mark.slow


def test_an_incomplete_cache_lists_missing_parts(
    on_ranks: Callable[..., CommandResult], conversations: Path, tmp_path: Path
) -> None:
    flags = ["--model-name-or-path=pocket", f"--data-path={conversations}", f"--output-dir={tmp_path / 'cache'}"]
    part = on_ranks(1, "prepare", *flags, "--shard", "1/3")
    assert (part.code, part.stdout) == (0, "")
    missing = "still missing: 0/3, 2/3; the process that completes the last part joins them"
    assert part.stderr == f"part 1/3 is complete in {tmp_path / 'cache.parts'}; {missing}\n"
    again = on_ranks(1, "prepare", *flags, "--shard", "0/3", "--json")
    assert (again.code, again.json["shard"], again.json["joined"]) == (0, "0/3", False)
    assert again.json["conversations"] < 24
    last = on_ranks(1, "prepare", *flags, "--shard", "2/3")
    assert (last.code, last.stdout) == (0, f"{tmp_path / 'cache'}\n")
    assert "t5tune inspect" in last.stderr
    assert on_ranks(1, "prepare", *flags, "--shard", "2/3", "--json").json["conversations"] == 24


@pytest.mark.distributed
def test_ranks_that_join_parts_print_the_cache_path(
    on_ranks: Callable[..., CommandResult], conversations: Path, tmp_path: Path
) -> None:
    flags = ["--model-name-or-path=pocket", f"--data-path={conversations}", f"--output-dir={tmp_path / 'cache'}"]
    done = on_ranks(3, "prepare", *flags, "--shard=auto")
    # two that complete their parts at the same moment both join them, to the same bytes
    assert (done.code, {*done.stdout.splitlines()}) == (0, {str(tmp_path / "cache")}), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
