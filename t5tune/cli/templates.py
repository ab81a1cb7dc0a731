"""`t5tune templates`, `t5tune schema` and `t5tune train --dry-run` on the terminal."""

import io
import json
from typing import TextIO

from t5tune.cli.console import as_json
from t5tune.cli.plan import print_plan
from t5tune.commands.plan import plan, plan_of
from t5tune.commands.schema import schema
from t5tune.commands.templates import templates
from t5tune.progress import Note, Report
from t5tune.settings import SchemaSettings, TemplatesSettings, TrainSettings, dump_settings


def show_templates(settings: TemplatesSettings, report: Report, stream: TextIO, want_json: bool) -> None:
    """The list, the text of one, or the paths that were made."""
    result = templates(settings, report)
    if want_json:
        print(as_json(result), file=stream, flush=True)
    elif settings.action == "list":
        for kind, names in result.names.items():
            print(f"{kind}: {' '.join(names)}", file=stream, flush=True)
    elif settings.action == "show" and result.shown is not None:
        print(result.shown.read_text(encoding="utf-8"), end="", file=stream, flush=True)
    else:
        for path in result.copied:
            print(path, file=stream, flush=True)


def show_schema(settings: SchemaSettings, stream: TextIO) -> None:
    """The JSON schema of a command's YAML."""
    print(json.dumps(schema(settings.of), indent=2, ensure_ascii=False), file=stream, flush=True)


def show_dry_run(settings: TrainSettings, report: Report, stream: TextIO, want_json: bool) -> None:
    """What train would do: its settings with all defaults, and as comments its plan and the command of its processes.

    So what stands on stdout is a file for `--config`.
    """
    from t5tune.training.run_folder import with_those_of_cache
    from t5tune.training.validate import check, missing_gpus

    check(settings)
    if (problem := missing_gpus(settings)) is not None:
        report(Note(problem, warning=True))
    settings = with_those_of_cache(settings)
    planned = plan(plan_of(settings), report)
    command = launcher_command(settings)
    if want_json:
        body = {
            "settings": settings.model_dump(mode="json"), "plan": json.loads(as_json(planned)), "command": command,
        }  # fmt: skip
        print(json.dumps(body, ensure_ascii=False), file=stream, flush=True)
        return
    print(dump_settings(settings.model_copy(update={"dry_run": False})), file=stream)
    text = io.StringIO()
    print_plan(planned, text)
    print(f"starts, once it has written its settings: {' '.join(command)}", file=text)
    for line in text.getvalue().splitlines():
        print(f"# {line}".rstrip(), file=stream, flush=True)


def launcher_command(settings: TrainSettings) -> list[str]:
    """The torchrun line that does what --num-gpus and --num-processes do; without them, the one process's own."""
    count = settings.num_gpus or settings.num_processes or 1
    train = ["t5tune", "train", "--config", str(settings.output_dir / "settings.yaml")]
    return train if count == 1 else ["torchrun", "--nproc-per-node", str(count), "-m", *train]
