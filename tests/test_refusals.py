"""What t5tune refuses, and with which words: each row of refusals.yaml, as a user would meet it.

A row has

    files         what the command finds: name → text. Other contents are {} (an empty folder), {bytes: "…"} (each
                  character a byte), {copy: INPUT}, {change: {key: value}} in a JSON file of a copy, {link: TARGET},
                  {size: NUMBER} (zeros), {start: TEXT, repeat: TEXT, times: NUMBER, end: TEXT}, with the numbers from 0
                  in place of #, and ~, which deletes a file of a copy.
    run           the command line, in an empty folder with these files. A name in braces is one of `commands`, or an
                  attribute of `Inputs`.
    environment   variables, if there are any
    exit          the exit code: 2, if it isn't given
    message       all of stderr from the first error on, without `error: `: a text, or a list with a text for each line.
                  … is any text that can't be known here. {here} is the folder, and other paths are named as in `run`.
    writes        the folder that it leaves, if there is one. Other files that it writes must be named in its message.
    each          in place of several rows: {value} → the message, or what {answer} is in `message`; or a list of values
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

from t5tune.commands.export import export
from t5tune.commands.merge import merge
from t5tune.commands.prepare import prepare
from t5tune.commands.train import train
from t5tune.commands.trim import trim
from t5tune.io.yaml_file import read_yaml
from t5tune.settings import ExportSettings, MergeSettings, PrepareSettings, TrimSettings
from tests.support.models.adapters import make_rows_adapter, make_stock_adapter
from tests.support.models.bases import make_base
from tests.support.processes.command_line import CommandResult, t5tune_in_one_fork
from tests.support.train_runs import make_settings

TABLE = Path(__file__).with_name("refusals.yaml")


COLUMNS = {"files", "run", "environment", "exit", "message", "writes", "each"}


class Inputs:
    """Inputs of refusals that commands make, each when a row first uses it. Tests must not change them."""

    def __init__(self, folder: Path, base: Path, conversations: Path) -> None:
        self.folder, self.base, self.conversations = folder, base, conversations

    @cached_property
    def pairs(self) -> Path:
        """Six records of source and target."""
        path = self.folder / "pairs.jsonl"
        path.write_text("".join(f'{{"source": "count to {n}", "target": "{n} lamps"}}\n' for n in range(6)))
        return path

    @cached_property
    def cache(self) -> Path:
        """The token cache of the conversations."""
        values = {"model_name_or_path": str(self.base), "data_path": str(self.conversations)}
        return prepare(PrepareSettings(**values, output_dir=self.folder / "cache")).cache

    @cached_property
    def run(self) -> Path:
        """A finished run of two steps, with a checkpoint after each."""
        train(make_settings(self.base, self.conversations, self.folder / "run", max_steps=2, save_steps=1))
        return self.folder / "run"

    @cached_property
    def adapter(self) -> Path:
        """An adapter of stock PEFT."""
        return make_stock_adapter(self.base, self.folder / "adapter")

    @cached_property
    def rows_adapter(self) -> Path:
        """An adapter with trained token rows."""
        return make_rows_adapter(self.base, self.folder / "rows-adapter")[0]

    @cached_property
    def exported(self) -> Path:
        """The adapter of the run."""
        return export(ExportSettings(checkpoint=self.run, output_dir=self.folder / "exported")).adapter

    @cached_property
    def merged(self) -> Path:
        values = {"model_name_or_path": str(self.base), "adapter": [self.run], "verify": False}
        merge(MergeSettings(**values, output_dir=self.folder / "merged"))
        return self.folder / "merged"

    @cached_property
    def trimmed(self) -> Path:
        values = {"model_name_or_path": str(self.base), "data_path": str(self.conversations)}
        return trim(TrimSettings(**values, output_dir=self.folder / "trimmed")).checkpoint

    @cached_property
    def narrow_base(self) -> Path:
        """A base with smaller matrices of attention."""
        return make_base(self.folder / "narrow-base", tied=False, d_kv=4)

    @cached_property
    def short_base(self) -> Path:
        """A base with a single layer."""
        return make_base(self.folder / "short-base", tied=False, num_layers=1)


@pytest.fixture(scope="module")
def inputs(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), untied_base, conversations)


def replace(what: Any, names: dict[str, str]) -> Any:
    """Replace the names in braces in all texts of a value."""
    match what:
        case str():
            return re.sub(r"\{(\w+)\}", lambda found: names.get(found[1], found[0]), what)
        case dict():
            return {replace(key, names): replace(value, names) for key, value in what.items()}
        case list():
            return [replace(each, names) for each in what]
    return what


def list_cases(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """List the cases of a row, one for each value of `each`."""
    each = row.get("each", {"": row.get("message", "")})
    for value in each:
        answer = each[value] if isinstance(each, dict) else ""
        yield {"message": answer} | replace(row, {"value": str(value), "answer": str(answer)})


def write_file(path: Path, content: Any, inputs: Inputs) -> None:
    """Write a file of a row, as the docstring of this module explains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match content:
        case str():
            path.write_text(content, encoding="utf-8")
        case {"bytes": str() as text}:
            path.write_bytes(text.encode("latin-1"))
        case {"copy": str() as name}:
            source = getattr(inputs, name)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
        case {"change": values}:
            values = yaml.safe_load(values) if isinstance(values, str) else values  # {value} is a text
            path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")
        case {"link": str() as target}:
            path.symlink_to(target)
        case {"size": int() as size}:
            path.touch()
            os.truncate(path, size)
        case {"repeat": str() as text, "times": int() as number}:
            pieces = [text.replace("#", str(each)) for each in range(number)]
            path.write_text("".join([content.get("start", ""), *pieces, content.get("end", "")]), encoding="utf-8")
        case {} if not content:
            path.mkdir()
        case None:
            path.unlink()
        case _:
            raise AssertionError(content)


def list_files(folder: Path) -> Iterator[tuple[str, bytes | None]]:
    """List the files and folders below a folder, with the hashes of files."""
    for path in sorted(folder.rglob("*")):
        digest = None
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        yield str(path.relative_to(folder)), digest


def read_message(stderr: str, names: dict[str, str]) -> str:
    """Return stderr from the first error on, without labels and with names in place of paths."""
    for name, path in sorted(names.items(), key=lambda item: -len(item[1])):
        stderr = stderr.replace(path, f"{{{name}}}")
    lines = stderr.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("error: ")), len(lines))
    return "\n".join(line.removeprefix("error: ").strip() for line in lines[first:])


def find_difference(case: dict[str, Any], done: CommandResult, names: dict[str, str]) -> tuple[str, str]:
    """Return the message that was expected and the one that was shown: the same if only `…` differs."""
    lines = [case["message"]] if isinstance(case["message"], str) else case["message"]
    expected, message = "\n".join(line.strip() for line in lines), read_message(done.stderr, names)
    is_same = re.fullmatch(".*".join(map(re.escape, expected.split("…"))), message)
    return (message if is_same else expected), message


ROWS = read_yaml(TABLE)
COMMANDS = ROWS.pop("commands")


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_refusals(row: dict[str, Any], inputs: Inputs, tmp_path: Path) -> None:
    assert row.keys() <= COLUMNS
    used = {name for name in re.findall(r"\{(\w+)\}", f"{row} {COMMANDS}") if hasattr(inputs, name)}
    cases = [replace(case, COMMANDS) for case in list_cases(row)]
    paths = {name: str(getattr(inputs, name)) for name in used}
    runs, before = [], []
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in case.get("files", {}).items():
            write_file(folder / name, replace(content, {"here": str(folder)}), inputs)
        program, *words = (replace(word, paths) for word in shlex.split(case["run"]))
        assert program == "t5tune"
        runs.append((folder, words))
        before.append(dict(list_files(folder)))

    all_done = t5tune_in_one_fork(runs, row.get("environment", {}))

    for case, (folder, _), files, done in zip(cases, runs, before, all_done, strict=True):
        expected, message = find_difference(case, done, paths | {"here": str(folder)})
        assert message == expected
        assert (done.code, done.stdout) == (case.get("exit", 2), "")
        assert "Traceback" not in done.stderr
        after = dict(list_files(folder))
        assert {name: after.get(name) for name in files} == files
        unnamed = [name for name in after.keys() - files.keys() if name not in message]
        assert [name for name in unnamed if Path(name).parts[0] != case.get("writes")] == []
