"""Limit how long huggingface_hub waits for an answer, and refuse redirects to a different host."""

import os
from functools import cache
from typing import Any

HUB_HOST = "huggingface.co"  # also where hf.co redirects to
SECONDS_TO_CONNECT = 30.0
SECONDS_TO_ANSWER = 60.0
SECONDS_TO_ACCEPT = 120.0  # uploads and commits


class RedirectedElsewhere(Exception):
    """The Hub's API redirected to a different host, such as the login page of a network."""

    def __init__(self, host: str) -> None:
        super().__init__(f"redirected to {host}")
        self.host = host


@cache
def watch_requests_to_the_hub() -> None:
    """Let a request fail if the Hub accepts it and doesn't answer, unless a program has set a custom client.

    A redirect of the API to a different host fails, too: its answer isn't the Hub's. Files may be redirected.

    huggingface_hub 2.4 waits forever for requests without a timeout, such as a repository's list of files. The variable
    HF_HUB_DOWNLOAD_TIMEOUT applies to all reading requests.
    https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/utils/_http.py
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    if _http._GLOBAL_CLIENT_FACTORY is not _http.default_client_factory:
        return

    def make_client() -> Any:
        client = _http.default_client_factory()
        client.event_hooks["request"].append(_set_timeouts)
        client.event_hooks["response"].append(_refuse_redirect)
        return client

    set_client_factory(make_client)


def _set_timeouts(request: Any) -> None:
    from huggingface_hub import constants

    read = SECONDS_TO_ACCEPT
    if request.method in ("GET", "HEAD"):
        is_set = "HF_HUB_DOWNLOAD_TIMEOUT" in os.environ
        read = float(constants.HF_HUB_DOWNLOAD_TIMEOUT) if is_set else SECONDS_TO_ANSWER
    given = {name: seconds for name, seconds in request.extensions["timeout"].items() if seconds is not None}
    defaults = {"connect": SECONDS_TO_CONNECT, "read": read, "write": SECONDS_TO_ACCEPT}
    request.extensions["timeout"].update(defaults | given)


def _refuse_redirect(response: Any) -> None:
    from huggingface_hub import constants

    url = response.request.url
    if response.has_redirect_location and str(url).startswith(f"{constants.ENDPOINT}/api/"):
        target = url.join(response.headers["location"])
        if target.host not in (url.host, HUB_HOST):
            raise RedirectedElsewhere(target.host)
