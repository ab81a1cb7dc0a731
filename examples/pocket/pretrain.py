"""Pretrain the built-in model from scratch, on two CPU cores in under half an hour.

    python examples/pocket/pretrain.py --output runs/pocket-base

Run again after an interruption, it resumes from its last checkpoint. Seeds are fixed and the schedule counts steps, so
that a rerun, or an interrupted and resumed run, gives the same bits on the same machine with the same release of torch.

The training recipe:

- Muon on the hidden matrices (Jordan et al. 2024) and AdamW on the rest. T5's attention isn't scaled by 1/sqrt(d), so
  the queries have 0.15 of the learning rate.
- The position biases are initialized so that some heads attend to the previous, the next and the same position.
- The first examples contain random pieces to copy, so that the decoder learns to align.
- Embedding and head share one matrix while the learning rate is constant, so that the model can copy a piece that it
  can read.
- Two heads are guided by a loss, because a model of this size doesn't learn it by itself: one of the encoder attends to
  the same word elsewhere in the text, by which a question finds its fact, and one of the decoder attends to the word to
  be generated next (after Liu et al. 2016, who supervise attention with word alignments).
- The embedding of a piece is initialized from its letters, and words of random pieces are spelled out in examples,
  because no other text says which letters a piece consists of.
"""

import argparse
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from families import FAMILIES, SHARES, Turns, spelling
from make_tokenizer import LONGEST_PIECE
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from t5tune.io.processes import die_with_parent

TOKENIZER = Path(__file__).parents[2] / "t5tune" / "pocket"
SEED = 20261124
STEPS = 5000
THREADS = 2  # fixed, because the number of threads changes the order of sums, and so their rounding
WARMUP_STEPS, CONSTANT_STEPS = 60, int(0.4 * STEPS)
MUON_RATE, QUERY_RATE, ADAM_RATE, WEIGHT_DECAY = 0.007, 0.15 * 0.007, 1e-2, 0.1
BATCH_COST = 3400  # padded source tokens + 1.3 × padded target tokens
POOL = 8192  # examples that are sorted by length and split into batches together
LONGEST = 256  # maximum tokens of a source
COPYING_EXAMPLES = 24_000
COPYING_SHARE = 0.05  # of copied random pieces, until the end: a piece that is never a target isn't learned
SPELLING_SHARE = 0.03  # of spelled words of random pieces, in addition to the examples of the spelling family
GUIDED_HEAD = 3  # the first of the six heads whose position bias isn't initialized
GUIDANCE = 0.3  # weight of the losses of the guided heads
SAVE_STEPS = 250
CONFIG = {
    "vocab_size": 1536,  # 1,497 pieces, and unused rows for the tokens that tuning adds
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 384,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "tie_word_embeddings": False,  # for transformers 5 this means that the hidden states aren't scaled before the head
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
FASTCHAT_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions. "
)
Example = tuple[list[int], list[int]]  # ids of source and target, EOS tokens included


# ---------------------------------------------------------------- examples


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


@cache
def pieces() -> list[str]:
    return [str(piece) for piece in tokenizer().convert_ids_to_tokens(range(len(tokenizer())))]


@cache
def pieces_of_letters() -> list[str]:
    """Return the pieces that can occur within a word."""
    return [piece for piece in pieces() if is_letters(piece)]


def is_letters(text: str) -> bool:
    return text.isascii() and text.isalpha()


def encode(texts: list[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer()(texts)["input_ids"]]


def lay_out(turns: Turns, rng: random.Random) -> tuple[str, str]:
    """Return source and target text of one turn of a conversation, mostly in the packaged conversation template."""
    last = len(turns) - 1 if rng.random() < 0.7 else rng.randrange(len(turns))
    kind = rng.random()
    human, assistant, between, system = "Human: ", "Assistant:", " ", ""
    if kind < 0.12:
        human, assistant, system = "### Human: ", "### Assistant:", FASTCHAT_SYSTEM if kind < 0.06 else ""
    elif kind < 0.25:
        human = assistant = ""
    words = [part for question, answer in turns[:last] for part in (human + question, assistant, answer)]
    words += [human + turns[last][0], assistant]
    return system + between.join(word for word in words if word), turns[last][1]


def pool(index: int) -> list[Example]:
    """Generate the examples of one pool, which depend only on its index."""
    examples: list[Example] = []
    texts: list[tuple[str, str]] = []
    for number in range(index * POOL, (index + 1) * POOL):
        rng = random.Random(f"{SEED} {number}")
        copying_share = COPYING_SHARE + 0.65 * max(0.0, 1 - number / COPYING_EXAMPLES)
        kind = rng.random()
        if kind < copying_share:
            copied = [rng.randrange(3, len(tokenizer()) - 24) for _ in range(rng.randint(3, 12))]
            examples.append(([*copied, 1], [*copied, 1]))
        elif kind < copying_share + SPELLING_SHARE:
            word = "".join(rng.choices(pieces_of_letters(), k=rng.randint(1, 3)))
            texts.append(lay_out(spelling(rng, word), rng))
        else:
            family = rng.choices(list(SHARES), list(SHARES.values()))[0]
            turns = FAMILIES[family](rng)
            texts.append(turns[0] if family == "spans" else lay_out(turns, rng))
    sources, targets = encode([source for source, _ in texts]), encode([target for _, target in texts])
    examples += [pair for pair in zip(sources, targets, strict=True) if len(pair[0]) <= LONGEST]
    return examples


def batches_of(index: int) -> list[list[Example]]:
    """Split one pool into shuffled batches of about equal cost, each with examples of similar length."""
    rng = random.Random(f"batches {SEED} {index}")
    examples = sorted(pool(index), key=lambda example: (len(example[1]) // 5, len(example[0]) + 3 * rng.random()))
    batches: list[list[Example]] = [[]]
    for example in examples:
        longer = [*batches[-1], example]
        width = max(len(source) for source, _ in longer) + 1.3 * max(len(target) for _, target in longer)
        if width * len(longer) > BATCH_COST and batches[-1]:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def batches_from(index: int, skip: int) -> Iterator[tuple[int, int, list[Example]]]:
    """Yield (pool index, batch index, batch) from a given batch on; the next pool is generated in the background."""
    with ProcessPoolExecutor(1, initializer=die_with_parent) as worker:
        coming = worker.submit(batches_of, index)
        while True:
            batches = coming.result()
            coming = worker.submit(batches_of, index + 1)
            for place in range(skip, len(batches)):
                yield index, place, batches[place]
            index, skip = index + 1, 0


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


# ---------------------------------------------------------------- guided heads


def parts_of_words(ids: list[int]) -> list[int]:
    """Return a number for each piece: equal for the same piece at the same position of the same word; 0: not a word."""
    words: list[list[str]] = []
    for piece in map(pieces().__getitem__, ids):
        text = piece.removeprefix("▁")
        if piece == text and text.isalnum() and words and words[-1][-1].isalnum():
            words[-1].append(text)
        else:
            words.append([text])
    return [crc32(repr((word, place)).encode()) if text.isalnum() else 0
            for word in words for place, text in enumerate(word)]  # fmt: skip


def with_next_words(parts: list[int]) -> list[int]:
    """Replace the 0 of non-words in a target by the number of the next word's first piece, to look ahead for it."""
    numbers, following = [], 0
    for part in reversed(parts):
        following = part or following
        numbers.append(following)
    return numbers[::-1]


class GuidedHead:
    """One attention head, with a loss for the attention that doesn't go to the wanted positions."""

    def __init__(self, attention: torch.nn.Module) -> None:
        self.attention = attention
        attention.q.register_forward_hook(lambda _module, _given, output: setattr(self, "queries", output))
        attention.k.register_forward_hook(lambda _module, _given, output: setattr(self, "keys", output))

    def loss(self, wanted: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Compute the loss of the last forward pass: the mean of -log(attention to the wanted positions).

        The mean is over the queries that have wanted positions.
        `wanted` is a boolean tensor (batch, queries, keys); `bias` (positions and mask) is added to the scores.
        """
        width = self.attention.key_value_proj_dim
        head = slice(GUIDED_HEAD * width, (GUIDED_HEAD + 1) * width)
        attention = (self.queries[..., head] @ self.keys[..., head].mT + bias).log_softmax(-1)
        given = attention.masked_fill(~wanted, -1e4).logsumexp(-1)
        is_guided = wanted.any(-1)
        return -(given * is_guided).sum() / is_guided.sum().clamp(min=1)


class Guides:
    """The two guided heads of a model."""

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        self.first = model.encoder.block[0].layer[0].SelfAttention  # has the position bias of all layers
        self.same_word = GuidedHead(model.encoder.block[1].layer[0].SelfAttention)
        self.next_word = GuidedHead(model.decoder.block[-1].layer[1].EncDecAttention)

    def loss(self, batch: list[Example], sources: torch.Tensor) -> torch.Tensor:
        """Compute the loss of both heads for the forward pass of this batch; `sources` are its padded sources."""
        words = padded([parts_of_words(source) for source, _ in batch], 0)
        copies = padded([with_next_words(parts_of_words(target)) for _, target in batch], 0)
        elsewhere = (words[:, :, None] == words[:, None]) & ~torch.eye(words.shape[1], dtype=torch.bool)
        elsewhere &= (words != 0)[:, :, None]
        alone = sources.ne(0) & ~elsewhere.any(-1)  # these look at the EOS token
        elsewhere |= alone[:, :, None] & (sources == 1)[:, None]
        copied = (copies[:, :, None] == words[:, None]) & (copies != 0)[:, :, None]
        mask = torch.where(sources == 0, -1e4, 0.0)[:, None]
        positions = self.first.compute_bias(*elsewhere.shape[1:])[0, GUIDED_HEAD]
        return self.same_word.loss(elsewhere, mask + positions) + self.next_word.loss(copied, mask)


# ---------------------------------------------------------------- model and optimizers


def new_model() -> T5ForConditionalGeneration:
    torch.manual_seed(SEED)
    model = T5ForConditionalGeneration(T5Config(**CONFIG))
    model.config.tie_word_embeddings = False  # transformers 5 treats every T5 as tied
    model.lm_head.weight = model.shared.weight
    with torch.no_grad():
        model.shared.weight.normal_(0, 0.02)
        letters = 0.01 * torch.randn(LONGEST_PIECE, 128, CONFIG["d_model"])  # (position in a piece, letter, width)
        for row, piece in enumerate(pieces()):
            text = piece.removeprefix("▁")
            if is_letters(text):
                model.shared.weight[row] += letters[range(len(text)), list(text.encode())].sum(0)
        encoder, decoder = (
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
            for stack in (model.encoder, model.decoder)
        )
        # buckets 0, 1 and 2 are the same position and the two before it; 17 is the next position
        encoder[1, 0] += 4
        encoder[17, 1] += 4
        decoder[0, 0] += 4
        decoder[1, 1] += 4
        for nearby in (encoder, decoder):
            nearby[1, 2] += 2
            nearby[2, 2] += 2
        encoder[0, 2] += 2
    return model


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    hidden, queries, rest = [], [], []
    for name, parameter in model.named_parameters():
        is_hidden = ".block." in name and parameter.ndim == 2 and "relative" not in name
        (queries if is_hidden and name.endswith("ttention.q.weight") else hidden if is_hidden else rest).append(
            parameter
        )
    return [
        torch.optim.Muon(
            [{"params": hidden, "full_lr": MUON_RATE}, {"params": queries, "full_lr": QUERY_RATE}],
            weight_decay=WEIGHT_DECAY,
        ),
        torch.optim.AdamW([{"params": rest, "full_lr": ADAM_RATE}], betas=(0.9, 0.98), weight_decay=0.0),
    ]


def untie(model: T5ForConditionalGeneration, adam: torch.optim.Optimizer) -> None:
    """Give the head its own weights, initialized from the embedding, with a copy of its optimizer state."""
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    adam.add_param_group({"params": [model.lm_head.weight], "full_lr": ADAM_RATE})
    averages = adam.state.get(model.shared.weight, {})
    adam.state[model.lm_head.weight] = {name: value.clone() for name, value in averages.items()}


def rate(step: int) -> float:
    """Return the factor for all learning rates: warm-up, constant, then linear decay to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, (STEPS - step) / (STEPS - CONSTANT_STEPS))


# ---------------------------------------------------------------- the run


def pretrain(output: Path) -> None:
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    model = new_model()
    both = optimizers(model)
    state_file = output / "state.pt"
    step, index, place = 0, 0, 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        if state["step"] > CONSTANT_STEPS:
            untie(model, both[1])
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, index, place = state["step"], state["pool"], state["place"] + 1
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, steps {step} to {STEPS}", flush=True)
    guides = Guides(model)
    model.train()
    losses: list[torch.Tensor] = []
    started, first_step = time.monotonic(), step
    for pool_index, place_in_pool, batch in batches_from(index, place):
        if step == STEPS:
            break
        if step == CONSTANT_STEPS:
            untie(model, both[1])
        for group in (group for optimizer in both for group in optimizer.param_groups):
            group["lr"] = group["full_lr"] * rate(step)
        sources = padded([source for source, _ in batch], 0)
        labels = padded([target for _, target in batch], -100)
        loss = model(input_ids=sources, attention_mask=sources.ne(0).long(), labels=labels, use_cache=False).loss
        guidance = guides.loss(batch, sources)
        (loss + GUIDANCE * guidance).backward()
        torch.nn.utils.clip_grad_norm_([p for group in both[1].param_groups for p in group["params"]], 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        losses.append(torch.stack([loss.detach(), guidance.detach()]))
        if step % 50 == 0:
            pace = (time.monotonic() - started) / (step - first_step)
            mean, guided = torch.stack(losses[-50:]).mean(0).tolist()
            print(f"step {step}  loss {mean:.4f}  guided heads {guided:.4f}  {pace:.3f} s/step", flush=True)
        if step % SAVE_STEPS == 0 or step == STEPS:
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in both]}
            torch.save(
                state | {"step": step, "pool": pool_index, "place": place_in_pool}, state_file.with_suffix(".new")
            )
            state_file.with_suffix(".new").replace(state_file)
    model.to(torch.bfloat16).save_pretrained(output)
    for file in TOKENIZER.glob("tokenizer*.json"):
        shutil.copy(file, output)
    print(f"trained {step} steps; saved the model to {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and the model")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pretrain(options.output)


if __name__ == "__main__":
    main()
