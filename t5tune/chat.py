"""`t5tune chat`: replies of a base, an adapter, a run or a merged checkpoint, in the layout of training.

chatter = Chatter.load(ChatSettings(model_name_or_path="pocket", adapter="run"))
chatter.reply([Turn("human", "Hello")])
"""

import time
from dataclasses import dataclass
from typing import Any

from t5tune.data.encoding import Encoder, encode_prompt
from t5tune.data.formats import Conversation, Turn
from t5tune.data.records import Place
from t5tune.data.templates import Template, find_template, lay_out, question_end
from t5tune.data.tokenizer import Tokenizer
from t5tune.progress import Report, silent
from t5tune.settings import ChatSettings


@dataclass(frozen=True)
class Reply:
    """One answer; lengths in tokens, without the source's end token."""

    reply: str
    source_tokens: int
    reply_tokens: int
    seconds: float


@dataclass(frozen=True)
class Chatter:
    """A model ready to answer."""

    model: Any
    tokenizer: Tokenizer
    encoder: Encoder
    template: Template
    settings: ChatSettings

    @staticmethod
    def load(settings: ChatSettings, report: Report = silent) -> "Chatter":
        """Load the base, quantised if asked, and the adapter.

        Raises:
            ModelError, CheckpointError: the base or the adapter can't be used.
        """
        from transformers import set_seed

        from t5tune.model.inference import load_for_inference

        loaded = load_for_inference(settings, report)
        set_seed(settings.seed)
        template = find_template(settings.conversation_template, loaded.template_files, report)
        return Chatter(loaded.model, loaded.tokenizer, Encoder(loaded.tokenizer), template, settings)

    def reply(self, turns: list[Turn]) -> Reply:
        """Answer a conversation that ends with a human turn."""
        from t5tune.model.generation import generate

        started = time.monotonic()
        conversation = Conversation(Place("chat", 1, 0, 0), self.settings.system, tuple(turns))
        pieces = lay_out(conversation, self.template) + question_end(self.template, len(turns))
        source = encode_prompt(pieces, self.encoder, self.settings.model_max_length)
        (ids,) = generate(
            self.model,
            [[*source, self.tokenizer.eos_token_id]],
            self.tokenizer.eos_token_id,
            self.tokenizer.pad_token_id,
            self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
        )
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Reply(
            reply=text.removesuffix(self.template.answer_end),
            source_tokens=len(source),
            reply_tokens=len(ids),
            seconds=round(time.monotonic() - started, 3),
        )


def chat(settings: ChatSettings, report: Report = silent) -> Reply:
    """Answer `settings.prompt`, which must be set."""
    assert settings.prompt is not None
    return Chatter.load(settings, report).reply([Turn("human", settings.prompt)])
