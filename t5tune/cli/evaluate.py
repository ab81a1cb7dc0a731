"""`t5tune evaluate` on the terminal: evaluate in this process, or in workers, whose rank 0 shows the result."""

from t5tune.cli.output import Output
from t5tune.cli.workers import follow_launcher, run_in_workers
from t5tune.distributed.world import World
from t5tune.errors import SettingsError
from t5tune.io.atomic import check_replaceable
from t5tune.settings import EvaluateSettings
from t5tune.settings.packaged_templates import read_zero3_config


def run(settings: EvaluateSettings, output: Output) -> None:
    world = World.from_environment()
    if follow_launcher(world) or settings.process_count == 1:
        _evaluate(settings, output)
        return
    # what can be checked without torch fails before the workers import it
    if settings.output_dir is not None:
        check_replaceable(settings.output_dir, settings.overwrite)
    if settings.deepspeed is not None:
        read_zero3_config(settings.deepspeed)
    if settings.num_gpus is not None:
        from t5tune.runs.checks import find_missing_gpus

        if (problem := find_missing_gpus(settings)) is not None:
            raise SettingsError(problem)
    run_in_workers(settings, output, rank_0_shows_result=True)


def _evaluate(settings: EvaluateSettings, output: Output) -> None:
    from t5tune.cli.next_steps import list_next_steps
    from t5tune.commands.evaluate import evaluate  # imports torch, which a launching process doesn't need

    result = evaluate(settings, output.report)
    output.show(result, next_steps=list_next_steps(settings, result))
