"""The runs of a sweep are ordinary runs: each has the bits of a separate run, whatever stops the sweep."""

import json
import signal
import sys
from pathlib import Path

import pytest

from t5tune.commands.compare import compare
from t5tune.commands.train import train
from t5tune.commands.train.sweep import make_runs, sweep
from t5tune.errors import SettingsError
from t5tune.progress import Event, Note, Report
from t5tune.runs.metrics_log import MetricsLog
from t5tune.settings import CompareSettings, TrainSettings, write_settings
from tests.support.processes.command_line import t5tune_in_fork
from tests.support.processes.runs import Running, list_complete_steps, list_descendants, read_adapter, send_signal
from tests.support.train_runs import make_settings, write_config

RANKS = [2, 4]


@pytest.fixture(scope="module")
def alone(untied_base: Path, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The adapters of runs without a sweep."""
    folder = tmp_path_factory.mktemp("alone")
    for rank in RANKS:
        train(make_settings(untied_base, conversations, folder / f"lora_r={rank}", lora_r=rank, eval_fraction=0.2))
    return {f"lora_r={rank}": read_adapter(folder / f"lora_r={rank}") for rank in RANKS}


@pytest.fixture
def settings(untied_base: Path, conversations: Path, tmp_path: Path) -> TrainSettings:
    return make_settings(
        untied_base, conversations, tmp_path / "sweep", eval_fraction=0.2, save_steps=1, sweep={"lora_r": RANKS}
    )


@pytest.mark.slow
def test_a_sweep_trains_what_is_left_and_compares_all(
    alone: dict[str, bytes], settings: TrainSettings, tmp_path: Path
) -> None:
    settings = settings.replace(sweep={"lora_r": [*RANKS, 8]})
    folder, config = settings.output_dir, write_config(settings, tmp_path / "sweep.yaml")
    train(make_runs(settings)["lora_r=2"])
    before = (folder / "lora_r=2" / "metrics.jsonl").read_bytes()
    (folder / "lora_r=8").mkdir()
    (folder / "lora_r=8" / "thesis.txt").write_text("not a run")  # this makes one run fail
    done = t5tune_in_fork("train", "--config", config, "--jobs=2", "--json")
    assert done.code == 1, done.stderr
    assert (folder / "lora_r=2" / "metrics.jsonl").read_bytes() == before
    assert {name: read_adapter(folder / name) for name in alone} == alone
    assert sorted(path.name for path in folder.iterdir()) == ["data", "lora_r=2", "lora_r=4", "lora_r=8"]
    result, error = map(json.loads, done.stdout.splitlines())
    assert result["finished"] == ["lora_r=2", "lora_r=4"]
    assert str(folder / "lora_r=8") in result["failed"]["lora_r=8"]
    assert error["error"]["message"].startswith("sweep: 1 run failed: lora_r=8: ")
    losses = [row["values"]["loss"][0] for row in result["comparison"]["rows"]]
    assert losses == sorted(losses)
    assert {row["settings"]["lora_r"] for row in result["comparison"]["rows"]} == set(RANKS)
    for paths in ([folder], [folder / "*"], sorted(folder.iterdir())):
        rows = compare(CompareSettings(runs=paths)).rows
        assert [[str(run) for run in row.runs] for row in rows] == [row["runs"] for row in result["comparison"]["rows"]]


@pytest.mark.parametrize(("jobs", "is_shown"), [(1, True), (1, False), (2, True)])
def test_ctrl_c_is_reported_once(
    jobs: int, is_shown: bool, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_once(report: Report, **_: bool) -> None:
        report(Note("finishing this step"))
        raise KeyboardInterrupt

    monkeypatch.setattr("t5tune.commands.train.sweep.handle_signals", stop_at_once)
    notes = list[Event]()
    with pytest.raises(KeyboardInterrupt):
        sweep(settings.replace(jobs=jobs), notes.append, shows_runs=is_shown)
    # a run that shows its progress also reports the signal
    assert (Note("finishing this step") in notes) == (jobs == 2 or not is_shown)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.long
def test_a_stopped_sweep_goes_on_to_the_same_bits(
    number: signal.Signals, alone: dict[str, bytes], settings: TrainSettings, tmp_path: Path
) -> None:
    folder = settings.output_dir
    command = [
        sys.executable,
        "-m",
        "t5tune",
        "train",
        "--config",
        str(write_config(settings, tmp_path / "sweep.yaml")),
    ]
    with Running(command, folder) as running:
        running.wait_until(lambda: folder.is_dir() and list_complete_steps(folder / "lora_r=2"))
        processes = list_descendants(running.process.pid)
        send_signal(running.process.pid, number)
        assert running.wait() == (-9 if number == signal.SIGKILL else 143), running.log.read_text()
        running.wait_until_gone(processes)
    if number == signal.SIGTERM:
        assert "0 of 2 runs have finished. Run the same command to continue." in running.log.read_text()
    with Running(command, folder) as running:
        assert running.wait() == 0, running.log.read_text()
    assert {name: read_adapter(folder / name) for name in alone} == alone


def write_evaluations(run: TrainSettings, losses: list[float], is_finished: bool) -> None:
    """Write a run's metrics as training does, and whether it has finished."""
    (folder := run.output_dir).mkdir(parents=True)
    log = MetricsLog(folder)
    for step, loss in enumerate(losses, 1):
        log.write(step, {"eval_loss": loss})
    write_settings(folder, run)
    if is_finished:
        values = {"run": str(folder), "adapter": str(folder), "steps": 3, "epochs": 1.0, "train_loss": 1.0, "eval": {}}
        values |= dict.fromkeys(
            ("examples", "tokens", "trainable_parameters", "total_parameters", "peak_memory_bytes"), 1
        )
        values |= {"tokens_per_second": 1.0, "world_size": 1, "resumed_from": None, "seconds": 1.0}
        (folder / "result.json").write_text(json.dumps(values))


def test_a_run_worse_than_the_median_is_stopped(settings: TrainSettings) -> None:
    changed = settings.replace(sweep={"lora_r": [1, 2, 3, 4, 5, 6]}, median_stopping=True)
    names = list(runs := make_runs(changed))
    for number, name in enumerate(names[:5]):
        write_evaluations(runs[name], [2.0 + number, 1.0, 0.5], is_finished=True)
    write_evaluations(runs[names[5]], [4.5], is_finished=False)  # the median at step 1 is 4
    notes = list[Event]()
    result = sweep(changed, notes.append)
    assert result.stopped == ["lora_r=6"]
    assert len(result.finished) == 5
    texts = [note.text for note in notes if isinstance(note, Note)]
    unfinished = f"{settings.output_dir / names[5]}: not finished: its metrics are those up to step 1"
    assert f"{unfinished}; to finish it, run its command again" in texts


def test_runs_share_data_unless_a_setting_changes_it(settings: TrainSettings) -> None:
    changes = {"seed": [1, 2], "learning_rate": [0.1, 0.2], "model_max_length": [64, 128]}
    runs = make_runs(settings.replace(sweep=changes))
    folders = {str(run.preprocessed_path) for run in runs.values()}
    assert folders == {str(settings.output_dir / f"data,model_max_length={length}") for length in (64, 128)}
    raw = make_runs(settings.replace(sweep={"seed": [1, 2]}, preprocessed_path="tokens"))
    assert {str(run.preprocessed_path) for run in raw.values()} == {"tokens"}


def test_wrong_settings_are_refused_before_any_run_starts(settings: TrainSettings) -> None:
    changed = settings.replace(sweep={"lora_r": [2, 0], "learning_rat": [1.0]})
    with pytest.raises(SettingsError, match="learning_rat: .* did you mean learning_rate"):
        make_runs(changed)
    with pytest.raises(SettingsError, match="sweep: lora_r=0: lora_r: 0: "):
        make_runs(settings.replace(sweep={"lora_r": [2, 0]}))


def test_a_finished_run_with_other_settings_is_refused(settings: TrainSettings) -> None:
    write_evaluations(make_runs(settings)["lora_r=4"], [1.0], is_finished=True)
    make_runs(settings)
    with pytest.raises(SettingsError, match="sweep: lora_r=4: learning_rate: 0.01 before, 0.02 now; choose a new"):
        make_runs(settings.replace(learning_rate=0.02))


def test_a_call_of_train_refuses_a_sweep(settings: TrainSettings) -> None:
    with pytest.raises(SettingsError, match=r"sweep: train\(\) makes one run; call sweep"):
        train(settings)
