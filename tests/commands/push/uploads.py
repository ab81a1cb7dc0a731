"""Commands that upload."""

from pathlib import Path

from tests.support.processes.command_line import CommandResult, t5tune_in_fork
from tests.support.servers.hub import TOKEN, USER, Hub

NAME = f"{USER}/model"
TRAIN = (
    *("train", "--config", "pocket", "--num-data", 8, "--max-steps", 2, "--save-steps", 1, "--use-cpu"),
    *("--report-samples", 1, "--eval-strategy", "no"),
)


def run(hub: Hub, *arguments: object, token: str | None = TOKEN) -> CommandResult:
    environment = {**hub.environment, **({"HF_TOKEN": token} if token else {})}
    return t5tune_in_fork(*arguments, env=environment)


def assert_token_is_nowhere(folder: Path, done: CommandResult) -> None:
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
