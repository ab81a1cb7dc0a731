"""lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) with a model that `t5tune serve` serves.

    t5tune serve tuned=run &
    python t5tune_lm.py --model tuned --tasks tickets --include_path .

The harness sends a context and a continuation. Its model class for OpenAI's API joins them into one text, which an
encoder-decoder can't read: here, the context is the source, and the continuation is a target that /v1/score scores.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import requests
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

SECONDS_TO_ANSWER = 600
MAX_TARGETS = 256  # of a request to /v1/score


class ServedModel(LM):
    """A model on a server of t5tune.

    Args:
        as_chat: send contexts as messages, with the conversation template of training; otherwise unchanged.
    """

    def __init__(self, url: str, model: str, api_key: str = "none", num_clients: int = 8, as_chat: bool = True) -> None:
        super().__init__()
        self.url, self.model, self.as_chat, self.num_clients = url, model, as_chat, num_clients
        self.headers = {"Authorization": f"Bearer {api_key}"}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        groups: list[tuple[str, list[str]]] = []
        for context, group in groupby(requests, key=lambda request: request.args[0]):
            # the tokenizer puts the space between words before a target's first word by itself
            targets = [request.args[1].lstrip(" ") for request in group]
            groups += [(context, targets[at : at + MAX_TARGETS]) for at in range(0, len(targets), MAX_TARGETS)]
        with ThreadPoolExecutor(self.num_clients) as pool:
            scored = list(pool.map(self._score, groups))
        return [(score["logprob"], score["is_greedy"]) for scores in scored for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("an encoder-decoder gives a text's probability only as a reply to a source")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        with ThreadPoolExecutor(self.num_clients) as pool:
            return list(pool.map(lambda request: self._generate(*request.args), requests))

    def _score(self, group: tuple[str, list[str]]) -> list[dict[str, Any]]:
        context, targets = group
        return self._post("score", {**self._make_source(context), "targets": targets})["scores"]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        values = {
            "stop": [until] if isinstance(until, str) else [text for text in until if text],
            "max_tokens": options.get("max_gen_toks", 256),
            "temperature": options.get("temperature", 0) if options.get("do_sample") else 0,
        }
        path = "chat/completions" if self.as_chat else "completions"
        (choice,) = self._post(path, {**self._make_source(context), **values})["choices"]
        return choice["message"]["content"] if self.as_chat else choice["text"]

    def _make_source(self, context: str) -> dict[str, Any]:
        if not self.as_chat:
            return {"prompt": context}
        return {"messages": [{"role": "user", "content": context}]}

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = requests.post(
            f"{self.url}/v1/{path}", json={"model": self.model, **body}, headers=self.headers, timeout=SECONDS_TO_ANSWER
        )
        if not answer.ok:
            raise RuntimeError(answer.json()["error"]["message"])
        return answer.json()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="its name on the server")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--include_path", help="a folder with more tasks")
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--no-chat", action="store_true", help="send contexts without the conversation template")
    parser.add_argument("--output", help="a file for the results")
    given = parser.parse_args()
    results = simple_evaluate(
        model=ServedModel(given.url, given.model, given.api_key, as_chat=not given.no_chat),
        tasks=given.tasks,
        num_fewshot=given.num_fewshot,
        limit=given.limit,
        task_manager=TaskManager(include_path=given.include_path),
        log_samples=False,
    )
    print(make_table(results))
    if given.output:
        with open(given.output, "w", encoding="utf-8") as file:
            json.dump(results["results"], file, indent=2, default=str)


if __name__ == "__main__":
    main()
