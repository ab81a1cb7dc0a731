"""kill -9 of prepare at random moments over an existing cache: the old or the new cache is there, and complete."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t5tune.commands.prepare import prepare
from t5tune.settings import PrepareSettings
from tests.support.caches import open_only
from tests.support.processes.runs import LONG, TIMEOUT, Running

pytestmark = pytest.mark.slow

KILLS = 50 if LONG else 4
RECORDS = 4000


def write_data(path: Path, word: str) -> Path:
    lines = [json.dumps({"source": f"{word} {number}", "target": f"yes, {number} {word}"}) for number in range(RECORDS)]
    path.write_text("\n".join(lines))
    return path


def read_data_name(cache: Path) -> str:
    """Read the name of the data file that a cache was made from, after verifying the cache."""
    return str(open_only(cache).manifest["inputs"]["data"][0]["file"])


def test_a_killed_prepare_leaves_the_old_or_the_new_cache(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    files = [write_data(tmp_path / "data" / f"{word}.jsonl", word) for word in ("lamps", "hats")]
    folder = tmp_path / "place"
    folder.mkdir()
    cache = folder / "cache"
    flags = ["--model-name-or-path", "pocket", "--output-dir", str(cache), "--num-workers", "1", "--data-path"]

    def start_run(file: Path) -> Running:
        command = [sys.executable, "-m", "t5tune", "prepare", *flags, str(file)]
        return Running(command, tmp_path / "prepare", TMPDIR=str(tmp_path))

    durations = []
    for file in files:  # the second one replaces the cache of the first, like the runs that are killed
        started = time.monotonic()
        with start_run(file) as running:
            assert running.wait() == 0, running.log.read_text()
        durations.append(time.monotonic() - started)
    old, new = files[1], files[0]
    rng = random.Random(11)
    for number in range(KILLS):
        # divide the time that prepare takes into equal parts, and kill it at a random moment of each
        moment = (number + rng.random()) / KILLS * durations[1]
        with start_run(new) as running:
            try:
                running.process.wait(moment)
            except subprocess.TimeoutExpired:
                running.process.send_signal(signal.SIGKILL)
            assert running.process.wait(TIMEOUT) in (-signal.SIGKILL, 0), running.log.read_text()
        assert read_data_name(cache) in (old.name, new.name)
        settings = PrepareSettings(model_name_or_path="pocket", data_path=str(new), output_dir=cache, num_workers=1)
        made = prepare(settings)
        assert (made.conversations, read_data_name(cache)) == (RECORDS, new.name)
        assert [path.name for path in folder.iterdir()] == ["cache"]
        old, new = new, old
