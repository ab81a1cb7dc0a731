"""Compare `t5tune serve` with one request at a time, and with CTranslate2 alone on the same batches.

    python benchmarks/serve.py --config flan-t5-small.json [--clients 1 8 64] [--seconds 20] [--max-tokens 32]
        [--prompts 256] [--engine ctranslate2] [--quantization int8] [--stream]

Makes a random base with the shape of a config.json, serves it in this process, and sends requests from a second
process: a raw HTTP client with `--clients` connections. Each connection sends a prompt of 8 to 64 words when it has the
reply to the last prompt. Prints one JSON line for each number of clients: requests and tokens per second, percentiles
of the time until a reply was complete and until its first token was there (milliseconds), how many replies were lost,
and how many differ from the same server's replies one at a time. Then

- `one_at_a_time`: requests per second of transformers' `generate`, one prompt at a time, in fp32, and the ratio,
- `of_limit`: the time that CTranslate2's own `translate_batch` takes for the same batches without a server, in relation
  to the time of the server, from the first batch to the last,
- `batch`: mean number of replies in a batch.

`--stream` asks for streamed replies; otherwise only the number with one client streams, to measure the first token.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sides import write_base

WORDS = ["red", "hats", "lamps", "for", "Mira", "please", "bring", "coffee", "tea", "bread", "to", "the", "table"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--engine", default="ctranslate2")
    parser.add_argument("--quantization")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--client-of", help="address of a server: be the client, and print the measurements")
    chosen = parser.parse_args()
    if chosen.client_of:
        print(json.dumps(asyncio.run(send_requests(chosen))))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder) / "base", json.loads(chosen.config.read_text()))
        keep_tokens_with_text(base)
        compare(chosen, base, Path(folder))


def keep_tokens_with_text(base: Path) -> None:
    """Set the head's rows of tokens without a text to zero, so that a random model never chooses one.

    Otherwise the first text of a reply would come long after its first token, and many replies would be empty.
    """
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    weights = load_file(base / "model.safetensors")
    head = weights["lm_head.weight"]
    for index in range(len(head)):
        if not tokenizer.decode([index], skip_special_tokens=True).strip():
            head[index] = 0
    save_file(weights, base / "model.safetensors", {"format": "pt"})


def make_prompts(count: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(8, 64))) for _ in range(count)]


def compare(chosen: argparse.Namespace, base: Path, folder: Path) -> None:
    from t5tune import ServeSettings, serve
    from t5tune.serving.engines import TranslatorEngine

    settings = ServeSettings(
        models={"base": str(base)},
        port=0,
        engine=chosen.engine,
        quantization=chosen.quantization,
        converted_dir=folder / "converted",
        conversation_template="plain",
        use_cpu=True,
    )
    with serve(settings, lambda event: None) as server:
        engine = server._http._service.models["base"].engine
        batches = record_batches(engine)
        alone = run_client(chosen, server.url, clients=1, seconds=0, is_check=True)
        one_at_a_time = time_stock_replies(base, chosen)
        for clients in chosen.clients:
            batches.clear()
            found = run_client(chosen, server.url, clients, chosen.seconds)
            replies = found.pop("replies")
            found["different"] = sum(reply != alone["replies"][prompt] for prompt, reply in replies)
            started, ended = batches[0][0], batches[-1][1]
            facts: dict[str, Any] = {
                "clients": clients,
                "engine": engine.name,
                "batch": round(statistics.mean(len(sources) for _, _, sources in batches), 1),
                **found,
                "one_at_a_time": round(one_at_a_time, 2),
                "times_one_at_a_time": round(found["requests_per_second"] / one_at_a_time, 2),
            }
            if isinstance(engine, TranslatorEngine):
                limit = time_translator(engine, [sources for _, _, sources in batches], chosen.max_tokens)
                facts["of_limit"] = round(limit / (ended - started), 3)
            print(json.dumps(facts), flush=True)


def record_batches(engine: Any) -> list[tuple[float, float, list[list[int]]]]:
    """Record each batch of an engine: when it began and ended, and its sources."""
    batches: list[tuple[float, float, list[list[int]]]] = []
    generate = engine.generate

    def generate_and_record(generations: Any, on_token: Any) -> None:
        started = time.perf_counter()
        generate(generations, on_token)
        batches.append((started, time.perf_counter(), [generation.source for generation in generations]))

    engine.generate = generate_and_record
    return batches


def time_translator(engine: Any, batches: list[list[list[int]]], max_tokens: int) -> float:
    """Time CTranslate2's translate_batch on batches, without a callback."""
    tokens = [[[engine._tokens[index] for index in source] for source in sources] for sources in batches]
    started = time.perf_counter()
    for sources in tokens:
        engine._translator.translate_batch(
            sources, beam_size=1, max_input_length=0, max_decoding_length=max_tokens, min_decoding_length=0
        )
    return time.perf_counter() - started


def time_stock_replies(base: Path, chosen: argparse.Namespace) -> float:
    """Return the prompts per second of transformers' `generate`, one prompt at a time."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSeq2SeqLM.from_pretrained(base, dtype=torch.float32).eval()
    prompts = make_prompts(chosen.prompts)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < min(chosen.seconds, 10.0):
        inputs = tokenizer(prompts[done % len(prompts)], return_tensors="pt")
        model.generate(**inputs, max_new_tokens=chosen.max_tokens, do_sample=False)
        done += 1
    return done / (time.perf_counter() - started)


def run_client(
    chosen: argparse.Namespace, url: str, clients: int, seconds: float, is_check: bool = False
) -> dict[str, Any]:
    """Run the client in a separate process; with `is_check` it sends each prompt once."""
    options = ["--client-of", url, "--clients", clients, "--seconds", seconds, "--max-tokens", chosen.max_tokens]
    streams = ["--stream"] if (chosen.stream or clients == 1) and not is_check else []
    command = [sys.executable, __file__, *map(str, options), "--prompts", str(chosen.prompts), *streams]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout))


async def send_requests(chosen: argparse.Namespace) -> dict[str, Any]:
    prompts = make_prompts(chosen.prompts)
    host, _, port = chosen.client_of.removeprefix("http://").partition(":")
    waiting = iter(range(1 << 62) if chosen.seconds else range(len(prompts)))
    until = time.perf_counter() + chosen.seconds if chosen.seconds else float("inf")
    times: list[float] = []
    first: list[float] = []
    replies: list[tuple[int, str]] = []
    sent = 0

    async def talk() -> None:
        nonlocal sent
        reader, writer = await asyncio.open_connection(host, int(port))
        for number in waiting:
            if time.perf_counter() >= until:
                break
            prompt = number % len(prompts)
            sent += 1
            started = time.perf_counter()
            text, first_at = await ask(reader, writer, prompts[prompt], chosen)
            times.append(time.perf_counter() - started)
            if first_at is not None:
                first.append(first_at - started)
            replies.append((prompt, text))
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(talk() for _ in range(chosen.clients[0])))
    seconds = time.perf_counter() - started
    if not chosen.seconds:
        return {"replies": [text for _, text in sorted(replies)]}
    return {
        "requests_per_second": round(len(replies) / seconds, 2),
        "tokens_per_second": round(len(replies) * chosen.max_tokens / seconds),
        **summarize("reply_ms", times),
        **summarize("first_token_ms", first),
        "requests": sent,
        "lost": sent - len(replies),
        "replies": replies,
    }


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, prompt: str, chosen: argparse.Namespace
) -> tuple[str, float | None]:
    """Send one request on a connection. Return the text, and when its first token was there if it is streamed."""
    values = {"model": "base", "prompt": prompt, "max_tokens": chosen.max_tokens, "stream": chosen.stream}
    body = json.dumps(values).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(head.decode())
    if not chosen.stream:
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        return str(json.loads(await reader.readexactly(length))["choices"][0]["text"]), None
    text, first_at = "", None
    while size := int(await reader.readline(), 16):  # chunked transfer
        for event in (await reader.readexactly(size + 2)).decode().split("\n\n"):
            data = event.strip().removeprefix("data: ")
            if data and data != "[DONE]":
                piece = json.loads(data)["choices"][0]["text"]
                first_at = first_at or (time.perf_counter() if piece else None)
                text += piece
    await reader.readline()
    return text, first_at


def summarize(name: str, seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    found = {percent: ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] for percent in (50, 99)}
    return {f"{name}_p{percent}": round(value * 1000, 1) for percent, value in found.items()}


if __name__ == "__main__":
    main()
