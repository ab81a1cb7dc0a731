"""The page of `merge --to onnx` replies in Chromium as `chat` does; `make browser` runs this."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from t5tune.commands.chat import Chatter
from t5tune.commands.merge import merge
from t5tune.commands.train import train
from t5tune.data.reading.formats import Turn
from t5tune.settings import ChatSettings, MergeSettings
from tests.support.models.adapters import make_stock_adapter
from tests.support.models.model_types import load_stock, make_checkpoint
from tests.support.paths import REPOSITORY
from tests.support.servers.browser import Browser, Page
from tests.support.servers.web import serve_folder
from tests.support.train_runs import make_settings

pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed: pip install 't5tune[onnx]'")

EXAMPLE: str = pytest.importorskip("t5tune.converting.onnx").EXAMPLE
MODULES = os.environ.get("NODE_MODULES", "")
SCRIPTS = (
    "@huggingface/transformers/dist/transformers.min.js",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
)
pytestmark = pytest.mark.skipif(
    not MODULES, reason="NODE_MODULES isn't set to a folder with @huggingface/transformers; use make browser"
)


def add_scripts(web: Path) -> None:
    (web / "js").mkdir()
    for script in SCRIPTS:
        shutil.copy(Path(MODULES, script), web / "js")


def ask(page: Page, message: str) -> str:
    page.evaluate("document.querySelector('textarea').value = ''")
    page.type("textarea", message)
    page.wait_for("document.querySelector('#status').textContent.startsWith('Writing')")
    page.wait_for("!document.querySelector('button').disabled")
    status = page.evaluate("document.querySelector('#status').textContent")
    assert status.startswith("Replied in"), status
    return str(page.evaluate("document.querySelector('output').textContent"))


def test_the_page_gives_the_replies_of_chat(conversations: Path, tmp_path: Path) -> None:
    run, web = tmp_path / "run", tmp_path / "web"
    train(make_settings(Path("pocket"), conversations, run, max_steps=60, learning_rate=2e-3, save_steps=60))
    merge(MergeSettings(adapter=[run], output_dir=web, to="onnx", quantization="float32", verify=False))
    lines = (REPOSITORY / "examples/quickstart/heldout.jsonl").read_text().splitlines()[:10]
    orders = [json.loads(line)["conversations"][0]["value"] for line in lines]
    chatter = Chatter.load(ChatSettings(model_name_or_path=str(run), use_cpu=True))
    with serve_folder(web) as url, Browser.start() as browser:
        page = browser.open(url)
        page.wait_for("document.querySelector('#status').textContent.includes('scripts are missing')")
        add_scripts(web)
        page = browser.open(url)
        page.wait_for("!document.querySelector('button').disabled")
        assert [ask(page, order) for order in orders] == [chatter.reply([Turn("human", each)]).reply for each in orders]
        asked = [event["params"]["request"]["url"] for event in browser.events if "request" in event.get("params", {})]
        assert asked
        assert all(each.startswith((url, "blob:", "data:")) for each in asked)  # no other server
        assert browser.open(url, dark=True).is_dark()
        # the code for one's own page in the documents: it writes the text that the model of the page gets
        (snippet,) = re.findall(r"```js\n(.*?)```", (REPOSITORY / "docs/small.md").read_text(), re.DOTALL)
        snippet = snippet.replace('"q8"', '"fp32"').replace("max_new_tokens: 64", "max_new_tokens: 512")
        snippet = snippet.replace(EXAMPLE, orders[0])
        script = f'<script type="module">{snippet}globalThis.found = reply.generated_text;</script>'
        (web / "own.html").write_text(script, encoding="utf-8")
        page = browser.open(f"{url}/own.html")
        page.wait_for("globalThis.found !== undefined")
        assert page.evaluate("globalThis.found") == chatter.reply([Turn("human", orders[0])]).reply


# after the page has set up transformers.js
GENERATE = """(async ids => {
  const { AutoModelForSeq2SeqLM, Tensor } = await import("./js/transformers.min.js");
  const model = await AutoModelForSeq2SeqLM.from_pretrained(".", { dtype: "fp32", device: "wasm" });
  const make = values => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const inputs = { inputs: make(ids), attention_mask: make(ids.map(() => 1)) };
  return Array.from((await model.generate({ ...inputs, max_new_tokens: 20 })).data, Number);
})"""


@pytest.mark.parametrize("key", ["mt5", "umt5"])
def test_transformers_js_generates_the_ids_of_transformers(key: str, tmp_path: Path) -> None:
    """By ids, because transformers.js ignores the byte fallback of these tokenizers."""
    base = make_checkpoint(key, tmp_path / "base")
    adapter, web = make_stock_adapter(base, tmp_path / "adapter"), tmp_path / "web"
    values = {"model_name_or_path": str(base), "adapter": [adapter]}
    for to, output in (("onnx", web), ("checkpoint", tmp_path / "merged")):
        merge(MergeSettings(**values, output_dir=output, to=to, verify=False))
    add_scripts(web)
    source = [5, 80, 17, 203, 44, 1]
    expected = load_stock(tmp_path / "merged").generate(torch.tensor([source]), max_new_tokens=20, do_sample=False)
    with serve_folder(web) as url, Browser.start() as browser:
        page = browser.open(url)
        page.wait_for("!document.querySelector('button').disabled")
        assert page.evaluate(f"{GENERATE}({source})") == expected[0].tolist()
