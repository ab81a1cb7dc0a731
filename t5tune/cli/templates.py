"""`t5tune templates` on the terminal: the names of the templates, the text of one, or the paths of the copies."""

from t5tune.cli.output import Output
from t5tune.commands.templates import Templates, templates
from t5tune.settings import TemplatesSettings


def run(settings: TemplatesSettings, output: Output) -> int:
    """List the templates, show one, or copy one."""
    result = templates(settings, output.report)
    output.show(result, _format(result))
    return 0


def _format(result: Templates) -> str:
    if result.copied:
        return "\n".join(map(str, result.copied))
    if result.shown is not None:
        return result.shown.read_text(encoding="utf-8").removesuffix("\n")
    return "\n".join(f"{kind}: {' '.join(names)}" for kind, names in result.names.items())
