"""The page in a browser: a chat, and two models next to each other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from t5tune.cli.chat import format_labeling
from t5tune.commands.chat import Chatter, Labeler
from t5tune.data.reading.formats import Turn
from t5tune.settings import ChatSettings
from tests.serving.conftest import StartServer
from tests.support.label_runs import ORDERS, train_labels
from tests.support.servers.browser import Browser, Page

pytestmark = pytest.mark.slow

MESSAGE = "Hello, two tea for Mira please."


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser.start() as found:
        yield found


def wait_for_models(page: Page, count: int) -> None:
    page.wait_for(f"document.querySelectorAll('#model-0 option').length === {count}")


def read_bubbles(page: Page, side: int) -> list[str]:
    found = page.evaluate(
        f"[...document.querySelectorAll('section')[{side}].querySelectorAll('p')].map(p => p.textContent)"
    )
    return list(found)


def wait_for_replies(page: Page, count: int) -> None:
    page.wait_for(f"document.querySelectorAll('small').length === {count} && running === null")


def list_problems(browser: Browser) -> list[Any]:
    """List the exceptions, and the log's warnings and errors. The log also has harmless notes about autofocus."""
    found = [event["params"] for event in browser.events if event["method"] == "Runtime.exceptionThrown"]
    entries = [event["params"]["entry"] for event in browser.events if event["method"] == "Log.entryAdded"]
    return found + [entry for entry in entries if entry["level"] in ("warning", "error")]


def test_two_models_reply_side_by_side_with_separate_histories(
    chats: dict[str, Path], start: StartServer, browser: Browser
) -> None:
    server = start({"base": str(chats["base"]), "tuned": str(chats["run"])}, engine="transformers")
    browser.events.clear()
    page = browser.open(server.url)
    wait_for_models(page, 2)
    page.type("#message", MESSAGE)
    wait_for_replies(page, 2)
    page.type("#message", "And <b>bread</b>")
    wait_for_replies(page, 4)
    for side, folder in enumerate((chats["base"], chats["run"])):
        chatter = Chatter.load(ChatSettings(model_name_or_path=str(folder), max_new_tokens=12, use_cpu=True))
        turns = [Turn("human", MESSAGE)]
        turns += [Turn("assistant", chatter.reply(turns).reply), Turn("human", "And <b>bread</b>")]
        assert read_bubbles(page, side) == [*(turn.text for turn in turns), chatter.reply(turns).reply]
    notes = page.evaluate("document.querySelector('small').textContent")
    assert notes.startswith("12 tokens · ")
    assert "cut off at the maximum length" in notes
    page.evaluate("document.querySelector('#clear').click()")
    assert read_bubbles(page, 0) == read_bubbles(page, 1) == []
    page.evaluate("choices[1].value = ''; choices[1].dispatchEvent(new Event('change'))")
    page.type("#message", MESSAGE)
    wait_for_replies(page, 1)
    assert read_bubbles(page, 1) == []
    assert page.evaluate("document.querySelectorAll('section')[1].hidden")
    # nothing comes from elsewhere, and nothing went wrong
    asked = {
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    }
    assert {url.removeprefix(server.url) for url in asked} == {"/", "/v1/models", "/v1/chat/completions"}
    assert not list_problems(browser)


def test_the_page_shows_labels_as_chat_does(
    untied_base: Path, start: StartServer, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kinds = ("classify", "several", "tag", "regress", "numbers")
    runs = {kind: train_labels(untied_base, tmp_path_factory.mktemp(kind), kind) for kind in kinds}
    server = start({**{kind: str(run) for kind, run in runs.items()}, "text": "pocket"}, engine="transformers")
    browser.events.clear()
    page = browser.open(server.url)
    wait_for_models(page, 6)
    page.evaluate("choices[1].value = 'text'; choices[1].dispatchEvent(new Event('change'))")
    for kind, run in runs.items():
        page.evaluate(f"choices[0].value = '{kind}'; choices[0].dispatchEvent(new Event('change'))")
        page.type("#message", ORDERS[0])
        wait_for_replies(page, 1)
        assert len(read_bubbles(page, 1)[1]) > 0
        shown, labels = read_bubbles(page, 0)
        assert shown == ORDERS[0]
        labeler = Labeler.load(ChatSettings(model_name_or_path=str(run), use_cpu=True))
        expected = format_labeling(labeler.label(ORDERS[0])).split()
        assert [*map(show_number, labels.split())] == [*map(show_number, expected)]
    assert not list_problems(browser)


def show_number(word: str) -> str:
    try:
        return f"{float(word):.4g}"
    except ValueError:
        return word


def test_the_page_asks_for_the_key_and_shows_errors(
    chats: dict[str, Path], start: StartServer, browser: Browser
) -> None:
    server = start({"base": str(chats["base"])}, engine="transformers", api_key="s3cret")
    page = browser.open(server.url)
    page.wait_for("document.querySelector('.hint')?.textContent.startsWith('no API key')")
    assert page.evaluate("document.activeElement.id") == "key"
    page.type("#key", "s3cret")
    wait_for_models(page, 1)
    page.evaluate("document.querySelector('#limit').value = 3000")
    page.type("#message", MESSAGE)
    page.wait_for("document.querySelector('.wrong') !== null && running === null")
    assert read_bubbles(page, 0) == [MESSAGE, "max_tokens: 3000: this server allows at most 2,048 tokens"]
    page.evaluate("document.querySelector('#limit').value = 3")
    page.type("#message", MESSAGE)
    wait_for_replies(page, 1)
    assert page.evaluate("document.querySelector('small').textContent").startswith("3 tokens")


def test_a_reply_can_be_stopped(chats: dict[str, Path], start: StartServer, browser: Browser) -> None:
    server = start({"base": str(chats["base"])}, engine="transformers", max_new_tokens=100_000)
    page = browser.open(server.url)
    wait_for_models(page, 1)
    page.type("#message", MESSAGE)
    page.wait_for("document.querySelector('.model')?.textContent.length > 10")
    page.evaluate("document.querySelector('#send').click()")
    page.wait_for("running === null")
    assert read_bubbles(page, 0)[1].endswith(" (stopped)")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_into_any_window(
    width: int, dark: bool, chats: dict[str, Path], start: StartServer, browser: Browser
) -> None:
    models = {"base": str(chats["base"]), "a-rather-long-name/of-a-model": str(chats["run"])}
    server = start(models, engine="transformers")
    page = browser.open(server.url, width=width, dark=dark)
    wait_for_models(page, 2)
    page.type("#message", "word" * 300)
    wait_for_replies(page, 2)
    page.evaluate("document.querySelector('details').open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('#send').getBoundingClientRect().right") <= width
    assert page.is_dark() is dark
