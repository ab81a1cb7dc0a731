"""`t5tune chat`: replies of a base, an adapter, a run or a merged checkpoint, in the layout of training.

chatter = Chatter.load(ChatSettings(model_name_or_path="pocket", adapter="run"))
chatter.reply([Turn("human", "Hello")])
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5tune.data.encoding import Encoder, encode_prompt
from t5tune.data.records import Conversation, Turn
from t5tune.data.templates import Template, lay_out, load_template, question_end, template_from
from t5tune.data.tokenizer import load_tokenizer
from t5tune.progress import Note, Report, silent
from t5tune.settings import ChatSettings
from t5tune.weights.adapter import TEMPLATE
from t5tune.weights.base import find_base
from t5tune.yaml_file import read_yaml

DEFAULT_TEMPLATE = "fastchat-t5"


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
    tokenizer: Any
    encoder: Encoder
    template: Template
    settings: ChatSettings

    @staticmethod
    def load(settings: ChatSettings, report: Report = silent) -> "Chatter":
        """Load the base, quantised if asked, and the adapter.

        Raises:
            ModelError, CheckpointError: the base or the adapter can't be used.
        """
        import torch
        from transformers import set_seed

        from t5tune.model.device import choose_device
        from t5tune.model.load import load_base
        from t5tune.model.lora import load_adapter
        from t5tune.weights.adapter import read_adapter

        base = find_base(settings, report)
        if settings.adapter is not None:
            read_adapter(settings.adapter)  # its errors name the file
        device = choose_device(settings.use_cpu)
        dtype = torch.bfloat16 if settings.bf16 else torch.float32
        model = load_base(base, dtype, device, settings.q_lora)
        if settings.adapter is not None:
            model = load_adapter(model, settings.adapter)
        set_seed(settings.seed)
        has_tokenizer = settings.adapter is not None and (settings.adapter / "tokenizer_config.json").is_file()
        folder = settings.adapter if settings.adapter is not None and has_tokenizer else base
        tokenizer = load_tokenizer(folder)
        template = _template(settings, [folder, base], report)
        return Chatter(model, tokenizer, Encoder(tokenizer), template, settings)

    def reply(self, turns: list[Turn]) -> Reply:
        """Answer a conversation that ends with a human turn."""
        from t5tune.model.generation import generate_reply

        started = time.monotonic()
        conversation = Conversation("chat", 0, self.settings.system, tuple(turns))
        pieces = lay_out(conversation, self.template) + question_end(self.template, len(turns))
        source = encode_prompt(pieces, self.encoder, self.settings.model_max_length)
        ids = generate_reply(
            self.model,
            source,
            self.tokenizer.eos_token_id,
            self.tokenizer.pad_token_id,
            self.settings.max_new_tokens,
            self.settings.temperature,
            self.settings.top_p,
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


def _template(settings: ChatSettings, folders: list[Path], report: Report) -> Template:
    """The layout that was asked for, else the one saved with the model, else FastChat's."""
    if settings.conversation_template is not None:
        return load_template(settings.conversation_template)
    for folder in folders:
        if (folder / TEMPLATE).is_file():
            return template_from(read_yaml(folder / TEMPLATE), folder / TEMPLATE)
    report(Note(f"the model brings no conversation template; using {DEFAULT_TEMPLATE}"))
    return load_template(DEFAULT_TEMPLATE)
