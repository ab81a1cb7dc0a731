"""Progress bars in notebooks and scripts: `train(settings, progress_bar())`."""

import sys
from importlib.util import find_spec
from typing import Any

from t5tune.formatting import format_metrics, format_number
from t5tune.progress import Advanced, Evaluated, Event, Finished, Measured, Note, Report, Started


def progress_bar() -> Report:
    """Return a `Report` that draws tqdm's bars: widgets in a notebook if ipywidgets is installed, or else text."""
    return _Bars()


class _Bars:
    def __init__(self) -> None:
        is_notebook = _is_in_kernel()
        if is_notebook and find_spec("ipywidgets") is not None:
            from tqdm.notebook import tqdm
        else:
            from tqdm import tqdm
        self._tqdm: Any = tqdm
        # Jupyter shows stderr in red
        self._stream = sys.stdout if is_notebook else sys.stderr
        self._bars: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case Started(task, total, unit):
                # a bar inside a longer task vanishes when it is done
                options = {"leave": not self._bars, "file": self._stream, "dynamic_ncols": True}
                self._bars[task] = self._tqdm(desc=task, total=total, unit=unit, **options)
            case Advanced(task, done):
                bar = self._bars[task]
                bar.update(done - bar.n)
            case Measured(task, _, values):
                metrics = [f"{name} {format_number(value)}" for name, value in values.items()]
                self._bars[task].set_postfix_str(", ".join(metrics))
            case Evaluated(_, step, values, is_best, datasets):
                metrics = format_metrics(values, datasets)
                self._write(f"step {step:,}: {', '.join(metrics)}{' (best)' if is_best else ''}")
            case Note(text, is_warning):
                self._write(f"warning: {text}" if is_warning else text)
            case Finished(task):
                self._bars.pop(task).close()

    def _write(self, line: str) -> None:
        self._tqdm.write(line, file=self._stream)


def _is_in_kernel() -> bool:
    """Return whether Jupyter runs this code, since only its shell has a kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None
