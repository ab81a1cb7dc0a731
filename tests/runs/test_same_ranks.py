"""Ranks that would train differently from rank 0 are refused, with the differences."""

import json
import os
from pathlib import Path

import pytest

from t5tune.runs.same_ranks import find_differences
from t5tune.settings import packaged_templates
from tests.support.processes.forks import ForkServer
from tests.support.processes.runs import make_arguments


@pytest.mark.parametrize(
    ("gathered", "different"),
    [
        ([{"a": 1, "b": None}, {"a": 1, "b": None}], []),
        ([{"a": 1}, {"a": 2}], ["a: 1 on rank 0, 2 on rank 1"]),
        ([{"a": 1}] * 4 + [{"a": "x"}] * 3, ['a: 1 on ranks 0 to 3, "x" on ranks 4 to 6']),
        ([{"a": 1}, {"a": 2}, {"a": 1}], ["a: 1 on ranks 0 and 2, 2 on rank 1"]),
        ([{"a": 1, "d.clip": 1}, {"a": 1}], ["d.clip: 1 on rank 0, null on rank 1"]),
        ([{"d": "given", "d.clip": 1}, {"d": None}], ['d: "given" on rank 0, null on rank 1']),
    ],
)
def test_what_differs_is_named_with_the_ranks(gathered: list[dict[str, object]], different: list[str]) -> None:
    assert find_differences(gathered) == different


SETTINGS = {  # what rank 1 has, or both ranks: the value, and the message
    "WEIGHT_DECAY": ("0.1", "weight_decay: 0.0 on rank 0, 0.1 on rank 1"),
    "LOGGING_STEPS": ("3", "logging_steps: 1 on rank 0, 3 on rank 1"),
    "EVAL_DATA_PATH": ("pocket", 'eval_data_path: null on rank 0, "given" on rank 1'),
    "MODEL_NAME_OR_PATH": ("pocket", "base: "),
    "DEEPSPEED": ("clipped.json", 'deepspeed.gradient_clipping: "auto" on rank 0, 0.5 on rank 1'),
    "DEEPSPEED on rank 1": ("none.json", 'deepspeed: "given" on rank 0, "deepspeed: none.json: no file'),
    "DEEPSPEED on both": ("none.json", "error: deepspeed: none.json: no file"),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.variants("WEIGHT_DECAY", "MODEL_NAME_OR_PATH", "DEEPSPEED on both")
def test_a_rank_with_other_settings_is_refused_before_training(
    name: str, fork_server: ForkServer, untied_base: Path, conversations: Path, tmp_path: Path
) -> None:
    (value, message), run = SETTINGS[name], tmp_path / "run"
    name, _, place = name.partition(" on ")
    config = packaged_templates.read_deepspeed_config("zero2")
    (tmp_path / "clipped.json").write_text(json.dumps(config | {"gradient_clipping": 0.5}))
    flag = f"--{name.lower().replace('_', '-')}="
    common = {**os.environ, "T5TUNE_MODEL_NAME_OR_PATH": str(untied_base), "T5TUNE_LOGGING_STEPS": "1"}
    if name == "DEEPSPEED":
        common["T5TUNE_DEEPSPEED"] = value if place == "both" else "zero2"
    done = fork_server.run(
        [each for each in make_arguments(untied_base, conversations, run) if not each.startswith(flag)],
        2,
        calls=[f"tests.support.ranks.faults:set_on_rank_1('T5TUNE_{name}', {value!r})"],
        environment=common,
        cwd=tmp_path,
    )
    assert done.codes == [2, 2], done.log
    assert message in done.log
    assert done.log.count(message) == 1, "only rank 0 shows it"
    assert not list(run.glob("checkpoint-*"))
