"""Chat with models that predict labels: their labels are evaluate's, on a terminal, in a pipe, and in Python."""

import io
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from t5tune.cli.chat import format_labeling, run
from t5tune.cli.output import Output
from t5tune.commands.chat import Chatter, Labeler, Labeling, chat
from t5tune.commands.merge import merge
from t5tune.errors import ModelError, SettingsError
from t5tune.progress import Event, Note
from t5tune.settings import ChatSettings, MergeSettings
from tests.commands.chat.typed import chat_in_fork
from tests.support.label_runs import KINDS, ORDERS, predict, train_labels

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(untied_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: train_labels(untied_base, tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def load(model: Path, **changes: object) -> Labeler:
    return Labeler.load(ChatSettings(model_name_or_path=str(model), use_cpu=True, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_text_gets_the_labels_that_evaluate_predicts(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    labeler = load(runs[kind])
    predicted = predict(runs[kind], tmp_path / "scores")
    texts = [record[KINDS[kind].column] for record in KINDS[kind].records]
    are_numbers = KINDS[kind].settings["objective"] == "regress"
    for text, line in zip(texts, predicted, strict=True):
        found = labeler.label(text)
        wanted = line["prediction"]
        assert found.prediction == (pytest.approx(wanted, rel=1e-4) if are_numbers else wanted)
        assert found.probabilities == pytest.approx(line.get("probabilities"), abs=1e-4)
        assert found.probability == pytest.approx(line.get("probability"), abs=1e-4)
        if isinstance(text, list):
            assert labeler.label(" ".join(text)).prediction == found.prediction
            assert found.words == text


def test_a_merged_checkpoint_gives_the_labels_of_its_run(runs: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("classify", "regress", "residues"):
        folder, text = tmp_path / kind, KINDS[kind].records[0][KINDS[kind].column]
        merge(MergeSettings(adapter=[runs[kind]], output_dir=folder, verify=False))
        found, wanted = (replace(load(model).label(text), seconds=0.0) for model in (folder, runs[kind]))
        for name, value in vars(wanted).items():
            same = value if name in ("prediction", "words") and kind != "regress" else pytest.approx(value, abs=1e-4)
            assert getattr(found, name) == same


def test_probabilities_and_marks_are_shown_best_first() -> None:
    classes = {"no": 0.1, **{f"class {number}": 0.9 / 2 ** (number + 1) for number in range(12)}, "yes": 0.4}
    one = Labeling("yes", 0.4, classes, None, 5, 0, 0.1)
    expected = "class 0 0.45  yes 0.40  class 1 0.23  class 2 0.11  no 0.10  "
    assert format_labeling(one).startswith(expected)
    assert format_labeling(one).endswith("class 7 0.00  and 4 more")
    several = Labeling(["yes", "no"], None, {"no": 0.5, "maybe": 0.2, "yes": 0.75}, None, 5, 0, 0.1)
    assert format_labeling(several) == "+yes 0.75  +no 0.50  maybe 0.20"
    words = Labeling(["O", None, "B-x"], None, [0.5, None, 0.75], ["a", " ", "b"], 5, 0, 0.1)
    assert format_labeling(words) == "a O 0.50  b B-x 0.75"
    assert format_labeling(Labeling([1.5, 2.0], None, None, ["a", "b"], 5, 0, 0.1)) == "a 1.5  b 2"
    assert format_labeling(Labeling(12345.6, None, None, None, 5, 0, 0.1)) == "12345.6"
    assert format_labeling(Labeling(1000003.3125, None, None, None, 5, 0, 0.1)) == "1000003"


def test_a_pipe_gets_the_labels_of_each_line(runs: dict[str, Path]) -> None:
    lines = [ORDERS[0], "/help", ORDERS[1]]
    for kind in ("classify", "tag"):
        labeler = load(runs[kind])
        done = chat_in_fork(runs[kind], "--use-cpu", stdin="\n".join(lines))
        assert done.code == 0, done.stderr
        assert done.stdout.splitlines() == [format_labeling(labeler.label(line)) for line in lines]
    done = chat_in_fork(runs["tag"], "--use-cpu", "--json", stdin=f"{ORDERS[0]}\n")
    found = json.loads(done.stdout)
    assert found["words"] == ORDERS[0].split()
    assert len(found["prediction"]) == len(found["probabilities"]) == len(found["words"])
    one = chat_in_fork(runs["tag"], "--use-cpu", "--json", "--prompt", ORDERS[0], stdin="").json
    assert {**one, "seconds": 0} == {**found, "seconds": 0}


class Typed(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_labels_and_refuses_commands_of_chats(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([ORDERS[0], "/template plain", "/retry", "//x", "/help", "/quit"])
    monkeypatch.setattr(sys, "stdin", Typed())
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    shown = io.StringIO()
    run(ChatSettings(model_name_or_path=str(runs["classify"]), use_cpu=True), Output(shown))
    labeler = load(runs["classify"])
    assert shown.getvalue().splitlines() == [format_labeling(labeler.label(text)) for text in (ORDERS[0], "/x")]
    notes = " ".join(capsys.readouterr().err.split())
    for name in ("template", "retry", "help"):
        assert f"error: /{name}: {runs['classify']} predicts labels; /quit is the only command; // sends a" in notes
    assert "Type a text to get its labels; begin with // to send a slash" in notes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"temperature": 1.0}, "temperature: 1.0: "),
        ({"max_new_tokens": 3}, "max_new_tokens: 3: "),
        ({"system": "Be brief."}, "system: Be brief.: "),
        ({"choices": ["tea"]}, "choices: ['tea']: "),
        ({"save_preferences": "file.jsonl"}, "save_preferences: file.jsonl: "),
    ],
)
def test_settings_of_replies_are_refused_before_loading(
    changes: dict[str, object], problem: str, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("t5tune.commands.chat.load_for_inference")
    with pytest.raises(SettingsError) as refused:
        load(runs["tag"], **changes)
    assert str(refused.value) == f"{problem}{runs['tag']} predicts labels, and writes no text; leave it out"


def test_models_of_the_wrong_kind_are_refused(runs: dict[str, Path], untied_base: Path) -> None:
    settings = ChatSettings(model_name_or_path=str(runs["tag"]), use_cpu=True, prompt="x")
    for call in (Chatter.load, chat):
        with pytest.raises(SettingsError, match=r"/run: predicts labels, and doesn't reply; load it with"):
            call(settings)
    with pytest.raises(SettingsError, match="writes text, and predicts no labels; load it with Chatter.load"):
        load(untied_base)
    chatter = Chatter.load(settings.model_copy(update={"model_name_or_path": str(untied_base)}))
    with pytest.raises(SettingsError, match=r"^adapter: .*/run: predicts labels, and doesn't reply"):
        chatter.with_adapter(runs["tag"])


def test_a_damaged_head_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs["classify"], tmp_path / "run")
    tensors = load_file(file := folder / "adapter_model.safetensors")
    for name in [name for name in tensors if "classifier" in name]:
        tensors[name].fill_(math.nan)
    save_file(tensors, file)
    shutil.copy(runs["classify"].parent / "data.jsonl", tmp_path)
    for use in (lambda: load(folder).label("x"), lambda: predict(folder, tmp_path / "scores")):
        with pytest.raises(ModelError, match="^the model's predictions aren't finite; "):
            use()


def test_text_beyond_the_maximum_length_is_reported(runs: dict[str, Path]) -> None:
    labeler = load(runs["tag"], model_max_length=12)
    found = labeler.label(ORDERS[0])
    assert found.source_tokens == 11
    assert found.words == ORDERS[0].split()
    assert found.prediction[0] is not None
    assert found.prediction[-1] is found.probabilities[-1] is None  # type: ignore[index]
    events: list[Event] = []
    labeler.report_cuts(found, events.append)
    cut = f"the model didn't see its last {found.cut_tokens} tokens; shorten it, or raise model_max_length"
    assert events == [Note(f"the text is too long for model_max_length 12: {cut}", warning=True)]
    for text in (" ", "\u200b", []):
        with pytest.raises(SettingsError, match="^text: nothing to read$"):
            labeler.label(text)
    for wrong in (5, ["a", 5]):
        with pytest.raises(SettingsError, match=r"^text: .*5\]?; give a text, or a list of words$"):
            labeler.label(wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"^text: contains bytes that aren't valid UTF-8: '\\udc80'"):
        labeler.label("a\udc80")
