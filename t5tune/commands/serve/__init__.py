"""`t5tune serve`: serve models over HTTP, for clients of OpenAI's API.

    with serve(ServeSettings(models=["base=google/flan-t5-base", "tuned=run"])) as server:
        print(server.url)
        server.reload()    # after `run` was trained again
        server.wait()

Greedy replies equal `chat`'s with the same model, settings and prompt. In bf16 and int8, where the sums of a batch are
rounded coarsely, the replies of a batch may differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING

from t5tune.commands.serve.load_models import ModelLoader
from t5tune.compat.quiet import quiet_libraries
from t5tune.errors import DependencyError, T5TuneError, to_t5tune_error
from t5tune.formatting import format_count
from t5tune.io.memory import return_freed_heap
from t5tune.model.device import explain_out_of_memory
from t5tune.progress import Event, Note, Report, silent
from t5tune.settings import ServeSettings
from t5tune.settings.calls import check_call

if TYPE_CHECKING:
    from t5tune.serving.app import Service
    from t5tune.serving.server import HttpServer

PACKAGES = "starlette uvicorn prometheus-client"


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Args:
        models: name -> what computes its replies, `ctranslate2` or `transformers`.
        needs_key: whether clients must send a key.
    """

    url: str
    models: dict[str, str]
    needs_key: bool


@dataclass(frozen=True)
class Reloaded:
    """The models after a reload, by name.

    Args:
        loaded: new models, and models whose files or settings changed.
        unchanged: models that weren't loaded again.
        needs_restart: settings that changed, but keep their values until the server is restarted.
    """

    loaded: list[str]
    unchanged: list[str]
    removed: list[str]
    needs_restart: list[str]


class Server:
    """A running server. As a context manager it stops at the end of the block."""

    def __init__(
        self,
        address: Address,
        http: "HttpServer",
        service: "Service",
        loader: ModelLoader,
        settings: ServeSettings,
        read_settings: Callable[[], ServeSettings] | None,
    ) -> None:
        self.address = address
        self._http = http
        self._service = service
        self._loader = loader
        self._settings = settings
        self._read_settings = read_settings or (lambda: self._settings)
        self._report = service.report
        self._is_stopped = False
        self._stopping = Lock()
        self._reloading = Lock()
        self.is_reloading = self._reloading.locked
        service.reload, service.is_reloading = self.reload, self.is_reloading

    @property
    def url(self) -> str:
        """Such as http://127.0.0.1:8000."""
        return self.address.url

    def wait(self) -> None:
        """Wait until another thread has stopped the server, or a signal raises KeyboardInterrupt."""
        self._http.wait()

    def reload(self, settings: ServeSettings | None = None) -> Reloaded:
        """Load new and changed models next to the served models, and switch when each has generated a token.

        The old models answer the requests that were accepted before; then their memory is freed. After an error, which
        is also reported, the server keeps all of its models.

        Args:
            settings: None: read again, as `serve` was told.
        """
        with self._reloading:
            try:
                reloaded = self._switch(settings or self._read_settings())
            except Exception as error:
                known = to_t5tune_error(error)
                problems = [*str(known).splitlines(), f"still serving {', '.join(self._service.models)}"]
                self._report(Note(f"not reloaded: {'; '.join(problems)}", warning=True))
                raise known from error
            lists = [f"{', '.join(names)} {key.replace('_', ' ')}" for key, names in vars(reloaded).items() if names]
            self._report(Note("reloaded: " + "; ".join(lists)))
            return reloaded

    def _switch(self, settings: ServeSettings) -> Reloaded:
        def report(event: Event) -> None:
            if isinstance(event, Note):  # a progress bar would mix with the lines of requests
                self._report(event)

        with quiet_libraries(), explain_out_of_memory("loading models next to the served models", "restart the server"):
            loader = ModelLoader(settings, report, self._loader)
            models = loader.load_all()
        if self._is_stopped:
            raise T5TuneError("the server has stopped")
        removed = [name for name in self._service.models if name not in models]
        self._service.use_models(models)
        before = {name: getattr(self._settings, name) for name in settings.needs_restart}
        changed = [name for name, value in before.items() if value != getattr(settings, name)]
        self._loader, self._settings = loader, settings.model_copy(update=before)
        return_freed_heap()  # of the old models, and of loading the new models
        return Reloaded([name for name in models if name not in loader.unchanged], loader.unchanged, removed, changed)

    def stop(self) -> None:
        """Refuse new requests, finish the replies that are being computed, and free the address."""
        with self._stopping:
            if self._is_stopped:
                return
            self._is_stopped = True
            timeout = self._settings.shutdown_timeout
            if cut_off := self._http.stop(timeout):
                replies = format_count(cut_off, "reply", "replies")
                self._report(Note(f"{replies} cut off after {timeout:g} seconds", warning=True))

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def serve(
    settings: ServeSettings, report: Report = silent, read_settings: Callable[[], ServeSettings] | None = None
) -> Server:
    """Load the models and start a server.

    Args:
        read_settings: called at each reload; None: a reload keeps the settings, and reads only the models' files.

    Raises:
        DependencyError: a package of the extra `serve` isn't installed.
        SettingsError: the address can't be used, or the engine can't run a model as the settings say.
        ModelError, CheckpointError: a model can't be used.
    """
    report = check_call("serve", settings, ServeSettings, report)
    try:
        from t5tune.serving.app import Service
        from t5tune.serving.batching import Schedule
        from t5tune.serving.computing import Batcher
        from t5tune.serving.metrics import Metrics
        from t5tune.serving.server import HttpServer, bind, format_url
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        problem = f"serve: {package} isn't installed"
        raise DependencyError(problem, hint=f"pip install {PACKAGES}") from error
    listener = bind(settings.host, settings.port, settings.reuse_port)
    url = format_url(listener, settings.host)
    metrics = Metrics()
    schedule = Schedule(settings.max_batch_tokens, settings.max_queue)
    metrics.watch(schedule)
    batcher = Batcher(schedule, max_delay=settings.max_batch_delay / 1000, on_batch=metrics.count_batch)
    max_replies = min(settings.max_replies, settings.max_queue)
    service = Service(batcher, metrics, max_replies, settings.api_key, settings.is_local, report)
    http: HttpServer | None = None
    try:
        if not settings.reuse_port:  # else the kernel would give requests to this server before it can answer
            http = HttpServer(service, listener, batcher)
        with quiet_libraries():
            loader = ModelLoader(settings, report)
            service.use_models(loader.load_all())
        http = http or HttpServer(service, listener, batcher, shares_port=True)
    except BaseException:
        if http is not None:
            http.stop(0)
        listener.close()
        raise
    engines = {name: model.engine.name for name, model in service.models.items()}
    address = Address(url, engines, settings.api_key is not None)
    return Server(address, http, service, loader, settings, read_settings)
