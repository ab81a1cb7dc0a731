"""A web server of a folder, on the loopback."""

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def serve_folder(folder: Path, refused: Mapping[str, int] = {}, cut: Collection[str] = ()) -> Iterator[str]:
    """Serve the files of a folder, and yield the address.

    Args:
        refused: names for which the answer is this status.
        cut: names of files of which only half is sent before the connection is closed.
    """

    class Handler(SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            name = self.path.partition("?")[0].rpartition("/")[2]
            if name in refused:
                return self.send_error(refused[name])
            return super().send_head()

        def copyfile(self, source: Any, outputfile: BinaryIO) -> None:  # type: ignore[override]
            body = source.read()
            is_cut = self.path.rpartition("/")[2] in cut
            outputfile.write(body[: len(body) // 2] if is_cut else body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
