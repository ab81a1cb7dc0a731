"""Each model type is served with the replies of chat, in a batch and with each engine that runs it."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from t5tune.commands.chat import Chatter
from t5tune.families import CTRANSLATE2, FAMILIES
from t5tune.settings import ChatSettings
from tests.serving.conftest import StartServer
from tests.serving.raw_http import ask, make_chat
from tests.support.models.model_types import make_checkpoint

pytestmark = pytest.mark.slow

MESSAGES = ["Two red hats", "one", "A lamp for Mira and the others at the table", "Hello there"]
LENGTH = 8


@pytest.mark.parametrize("key", FAMILIES)
@pytest.mark.variants("codet5", "flan-t5", "longt5", "t5gemma2")
def test_each_family_is_served_with_the_replies_of_chat(key: str, start: StartServer, tmp_path: Path) -> None:
    base = make_checkpoint(key, tmp_path / "base")
    chatter = Chatter.load(ChatSettings(model_name_or_path=str(base), max_new_tokens=LENGTH, use_cpu=True))
    expected = [chatter.reply(message).reply for message in MESSAGES]
    engines = ["transformers"]
    if CTRANSLATE2 in FAMILIES[key].converters:
        pytest.importorskip("ctranslate2")
        engines.append("ctranslate2")
    for engine in engines:
        with (
            start({"base": str(base)}, engine=engine, max_new_tokens=LENGTH, max_batch_delay=100) as server,
            ThreadPoolExecutor(len(MESSAGES)) as pool,
        ):
            answers = list(pool.map(partial(ask, server.url), map(make_chat, MESSAGES)))
        assert answers == expected, engine
    with start({"base": str(base)}) as server:
        assert server.address.models == {"base": engines[-1]}
