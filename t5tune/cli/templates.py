"""`t5tune templates`, `t5tune schema` and `t5tune train --dry-run` on the terminal."""

import io
import json
from typing import TextIO

from t5tune.cli.console import format_json
from t5tune.cli.plan import print_plan
from t5tune.commands.plan import plan, to_plan_settings
from t5tune.commands.schema import schema
from t5tune.commands.templates import templates
from t5tune.progress import Note, Report
from t5tune.settings import SchemaSettings, TemplatesSettings, TrainSettings, dump_settings


def show_templates(settings: TemplatesSettings, report: Report, stream: TextIO, as_json: bool) -> None:
    """Print the list of templates, the text of one, or the paths of the copies."""
    result = templates(settings, report)
    if as_json:
        print(format_json(result), file=stream, flush=True)
    elif settings.action == "list":
        for kind, names in result.names.items():
            print(f"{kind}: {' '.join(names)}", file=stream, flush=True)
    elif settings.action == "show" and result.shown is not None:
        print(result.shown.read_text(encoding="utf-8"), end="", file=stream, flush=True)
    else:
        for path in result.copied:
            print(path, file=stream, flush=True)


def show_schema(settings: SchemaSettings, stream: TextIO) -> None:
    """Print the JSON schema of a command's YAML."""
    print(json.dumps(schema(settings.of), indent=2, ensure_ascii=False), file=stream, flush=True)


def show_dry_run(settings: TrainSettings, report: Report, stream: TextIO, as_json: bool) -> None:
    """Print the settings with all defaults, then the plan and the launch command as comments.

    The output is a valid YAML file for `--config`.
    """
    from t5tune.training.run_folder import apply_cache_settings
    from t5tune.training.validate import check_settings, find_missing_gpus

    check_settings(settings)
    if (problem := find_missing_gpus(settings)) is not None:
        report(Note(problem, warning=True))
    settings = apply_cache_settings(settings)
    planned = plan(to_plan_settings(settings), report)
    command = make_launch_command(settings)
    if as_json:
        body = {
            "settings": settings.model_dump(mode="json"), "plan": json.loads(format_json(planned)), "command": command,
        }  # fmt: skip
        print(json.dumps(body, ensure_ascii=False), file=stream, flush=True)
        return
    print(dump_settings(settings.model_copy(update={"dry_run": False})), file=stream)
    text = io.StringIO()
    print_plan(planned, text)
    print(f"launch command, once the settings are written: {' '.join(command)}", file=text)
    _print_as_comments(text.getvalue(), stream)


def _print_as_comments(text: str, stream: TextIO) -> None:
    for line in text.splitlines():
        print(f"# {line}".rstrip(), file=stream, flush=True)


def make_launch_command(settings: TrainSettings) -> list[str]:
    """Make the torchrun command equivalent to --num-gpus or --num-processes; `t5tune train` for a single process."""
    count = settings.num_gpus or settings.num_processes or 1
    train = ["t5tune", "train", "--config", str(settings.output_dir / "settings.yaml")]
    return train if count == 1 else ["torchrun", "--nproc-per-node", str(count), "-m", *train]
