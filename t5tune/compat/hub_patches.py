"""A limit on how long huggingface_hub waits for an answer."""

import os
from functools import cache
from typing import Any

SECONDS_TO_CONNECT = 30.0
SECONDS_TO_ANSWER = 60.0
SECONDS_TO_ACCEPT = 120.0  # what is uploaded, and a commit of it


@cache
def limit_waiting_for_the_hub() -> None:
    """Let a request fail if the Hub accepts it and doesn't answer, unless a program has set a client of its own.

    huggingface_hub 2.4 waits forever where it gives no timeout, and for what a repository contains it asks with none.
    HF_HUB_DOWNLOAD_TIMEOUT applies to all that is only read.
    https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/utils/_http.py
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    if _http._GLOBAL_CLIENT_FACTORY is not _http.default_client_factory:
        return

    def make_client() -> Any:
        client = _http.default_client_factory()
        client.event_hooks["request"].append(_set_timeouts)
        return client

    set_client_factory(make_client)


def _set_timeouts(request: Any) -> None:
    from huggingface_hub import constants

    read = SECONDS_TO_ACCEPT
    if request.method in ("GET", "HEAD"):
        is_set = "HF_HUB_DOWNLOAD_TIMEOUT" in os.environ
        read = float(constants.HF_HUB_DOWNLOAD_TIMEOUT) if is_set else SECONDS_TO_ANSWER
    timeouts = request.extensions["timeout"]
    for name, seconds in (("connect", SECONDS_TO_CONNECT), ("read", read), ("write", SECONDS_TO_ACCEPT)):
        if timeouts.get(name) is None:
            timeouts[name] = seconds
