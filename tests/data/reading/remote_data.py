"""Records that aren't on this machine, and how they are prepared."""

import json
from pathlib import Path

from tests.support.caches import find_cache, open_only
from tests.support.processes.command_line import CommandResult, t5tune_in_fork
from tests.support.servers.hub import Hub


def make_records(*numbers: int) -> list[dict[str, str]]:
    return [{"source": f"What is {number} plus one?", "target": f"It is {number + 1}."} for number in numbers]


def to_jsonl(*numbers: int) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in make_records(*numbers)).encode()


def prepare(hub: Hub | None, name: str, output: Path, *flags: object, **environment: str) -> CommandResult:
    common = ("--model-name-or-path", "pocket", "--output-dir", output, "--data-path", name)
    flags = (*flags, "--conversation-template", "plain")
    return t5tune_in_fork("prepare", *common, *flags, env={**(hub.environment if hub else {}), **environment})


def read_sources(cache: Path) -> list[str]:
    """Return the texts of a cache's sources, which show which records were read."""
    from t5tune.data.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(find_cache(cache) / "tokenizer")
    return [tokenizer.decode(example.source_S, skip_special_tokens=True) for example in open_only(cache)]


def expect(*numbers: int) -> list[str]:
    return [record["source"] for record in make_records(*numbers)]
