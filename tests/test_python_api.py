"""`from t5tune import …`: names, signatures and mistakes."""

import ast
import inspect
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import mypy.api
import pytest

import t5tune
from t5tune import (
    ChatSettings,
    Chatter,
    MergeSettings,
    SettingsError,
    TrainSettings,
    load_settings,
    progress_bar,
    train,
)
from t5tune.errors import DataError
from t5tune.settings import COMMANDS
from tests.support.python_api import make_settings, run_python

# ---------------------------------------------------------------- names and signatures


def test_importing_t5tune_imports_no_library() -> None:
    code = "import sys, t5tune; print(*{'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules))"
    assert run_python(code, Path.cwd()).stdout == "\n"


def test_type_checkers_see_every_importable_name() -> None:
    body = ast.parse(Path(t5tune.__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    homes = {
        alias.asname: node.module
        for node in body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    homes |= {node.name: "t5tune.settings" for node in body if isinstance(node, ast.ClassDef)}
    assert homes.keys() == set(t5tune.__all__) == set(dir(t5tune))
    for name, module in homes.items():
        assert inspect.unwrap(getattr(t5tune, name)) is getattr(sys.modules[str(module)], str(name))
    assert (Path(t5tune.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="module 't5tune' has no attribute 'trian'"):
        t5tune.trian  # noqa: B018


@pytest.fixture(scope="module")
def first_signatures() -> dict[str, str]:
    """The signatures of the settings in a process that hasn't used them yet, by their commands."""
    code = "import inspect, json; from t5tune.settings import COMMANDS"
    code += "; print(json.dumps({model.command: str(inspect.signature(model)) for model in COMMANDS}))"
    signatures: dict[str, str] = json.loads(run_python(code, Path.cwd()).stdout)
    return signatures


@pytest.mark.parametrize("model", COMMANDS, ids=lambda model: model.command)
def test_signatures_are_the_same_before_and_after_first_use(
    model: type[t5tune.PrepareSettings], first_signatures: dict[str, str]
) -> None:
    with pytest.raises(SettingsError):
        model(no_such_setting=1)
    assert str(inspect.signature(model)) == first_signatures[model.command]
    parameters = inspect.signature(model).parameters
    assert set(parameters) == set(model.list_suggestions())
    for name, parameter in parameters.items():
        field = model.model_fields[name]
        assert parameter.default == (inspect.Parameter.empty if field.is_required() else field.default)
        assert "Annotated" not in str(parameter.annotation)


def test_the_signature_begins_with_what_people_use() -> None:
    start = (
        "(*, model_name_or_path: str, data_path: list[str] | str, output_dir: str | pathlib.Path, "
        "source_column: list[str] | str | None = None,"
    )
    signature = str(inspect.signature(TrainSettings)).replace("pathlib._local.", "pathlib.")  # in Python 3.13
    assert signature.startswith(start)
    assert "(settings: t5tune.settings.commands.train.TrainSettings, report:" in str(inspect.signature(train))


@pytest.mark.long
@pytest.mark.slow
def test_a_type_checker_accepts_the_documentation_and_flags_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(t5tune.__file__).parents[1])
    blocks = re.findall(r"```python\n(.*?)```", Path("docs/python.md").read_text(encoding="utf-8"), re.DOTALL)
    needed = 'model_name_or_path=run.run, data_path=[Path("a"), "b"], output_dir=Path("c")'
    more = [
        f"TrainSettings({needed}, lora_target_modules=('q', 'v'), eval_data_path=[{{'source': 'a'}}], adapter='x')",
        "MergeSettings(adapter=run.run, output_dir='merged', weights=[1, 0.5], max_shard_size='5GB')",
        "settings.replace(lora_r=4).lora_r + 1",
    ]
    mistakes = {
        f"TrainSettings({needed}, lora_rank=3)": 'Unexpected keyword argument "lora_rank"',
        f"TrainSettings({needed}, lora_r='x')": 'Argument "lora_r" to "TrainSettings" has incompatible type',
        f"TrainSettings({needed}, train_mode='lorra')": 'Argument "train_mode"',
        "TrainSettings(data_path='a', output_dir='b')": 'Missing named argument "model_name_or_path"',
        "t5tune.trian": 'Module has no attribute "trian"',
    }
    lines = ["import t5tune", "from pathlib import Path", "from t5tune import MergeSettings", *blocks, *more]
    (tmp_path / "script.py").write_text("\n".join([*lines, *mistakes]))
    config = tmp_path / "mypy.ini"
    # skipping the types of large libraries saves time, and changes nothing here
    config.write_text(
        "[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n"
        "[mypy-torch.*,transformers.*,numpy.*,pandas.*,pyarrow.*,rich.*,huggingface_hub.*]\nfollow_imports = skip\n"
    )
    words = ["--config-file", config, "--cache-dir", tmp_path / "cache", "--no-error-summary", "--hide-error-context"]
    shown = mypy.api.run([str(word) for word in (*words, tmp_path / "script.py")])[0]
    errors = [line for line in shown.splitlines() if " error: " in line]
    assert len(errors) == len(mistakes), shown
    assert all(message in line for message, line in zip(mistakes.values(), errors, strict=True)), shown


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 4}, "lora_rank: unknown setting; did you mean lora_r?"),
        ({"load_in_8bit": True}, "load_in_8bit: unknown setting; use q_lora=True and quant_type='int8'"),
        ({"lora_r": True}, "lora_r: True: expected a number, not true or false"),
        ({"lora_r": 0, "seed": -1}, "seed: -1: must be at least 0\nlora_r: 0: must be greater than 0"),
        ({"data_path": 5}, "data_path: 5: of type int; expected a path, or records: a list of dicts, a DataFrame or"),
        ({"output_dir": ""}, "output_dir: '': the path is empty; use `.` for the current folder"),
    ],
)
def test_a_mistake_is_explained_as_on_the_command_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        make_settings(tmp_path, **changes)
    assert str(caught.value).startswith(message) or message in str(caught.value)


def test_a_mistyped_required_setting_is_not_missing_too() -> None:
    with pytest.raises(SettingsError) as caught:
        TrainSettings(model="pocket", output_dir="run")
    problems = ["model: unknown setting; did you mean model_name_or_path?", "data_path: missing"]
    assert str(caught.value).splitlines() == problems


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_processes": 2}, "num_processes: 2: train() starts no processes; start the script with torchrun"),
        ({"dry_run": True}, "dry_run: train() has no dry run; call plan(PlanSettings(…)) instead"),
    ],
)
def test_train_refuses_options_of_the_command_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        train(make_settings(tmp_path, **changes))
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([{"data_path": "a"}], "settings: {'data_path': 'a'}; call train(TrainSettings(…))"),
        (["run.yaml"], "settings: 'run.yaml'; call train(TrainSettings(…))"),
        ([], "settings: None; call train(TrainSettings(…))"),
        ([t5tune.DoctorSettings()], "settings: DoctorSettings(timeout=120.0); call train(TrainSettings(…))"),
        ([Path("run"), progress_bar], "report: progress_bar: not a function that takes an event; call progress_bar()"),
        ([Path("run"), True], "report: True: not a function that takes an event; call progress_bar()"),
    ],
)
def test_arguments_in_the_wrong_place_are_explained(arguments: list[Any], message: str, tmp_path: Path) -> None:
    given = [make_settings(tmp_path) if each == Path("run") else each for each in arguments]
    with pytest.raises(SettingsError) as caught:
        train(*given)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_arguments_of_chatter_load_in_the_wrong_place_are_explained() -> None:
    with pytest.raises(SettingsError, match=r"^settings: 'run'; call Chatter\.load\(ChatSettings\(…\)\)$"):
        Chatter.load("run")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="^report: progress_bar: not a function that takes an event"):
        Chatter.load(ChatSettings(model_name_or_path="run"), progress_bar)  # type: ignore[arg-type]


def test_the_functions_can_be_pickled_for_another_process() -> None:
    for name in ("train", "evaluate", "prepare", "inspect", "load_settings", "TrainSettings", "Chatter"):
        function = getattr(t5tune, name)
        assert pickle.loads(pickle.dumps(function)) is function


def test_errors_are_one_line_in_ipython() -> None:
    error = DataError("a.jsonl: broken", hint="copy it again")
    assert str(error) == "a.jsonl: broken; copy it again"
    assert error._render_traceback_() == ["DataError: a.jsonl: broken; copy it again"]


def test_settings_can_come_from_a_run_config() -> None:
    settings, notes = load_settings(TrainSettings, "pocket", flags={"output_dir": "run"})
    assert (settings.learning_rate, settings.output_dir, notes) == (3e-3, Path("run"), [])
    assert isinstance(MergeSettings(adapter="run", output_dir="merged"), MergeSettings)
