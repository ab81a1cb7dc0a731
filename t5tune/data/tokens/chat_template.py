"""Write a conversation template as a Jinja chat template, for transformers' `apply_chat_template`.

    tokenizer = AutoTokenizer.from_pretrained("merged")
    tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)

The text is the source of training, between the model's special tokens. So its ids are the training ids, if the
conversation fits the length limit and no message spells out a special token. With tokenizers of a kind other than
SentencePiece, no earlier answer may follow a space or a newline of the template with which it could share a token.
"""

import re
from pathlib import Path
from typing import Any

from t5tune.data.reading.record_turns import ROLES
from t5tune.data.tokens.templates import Template
from t5tune.data.tokens.tokenizer import Tokenizer
from t5tune.data.tokens.vocabulary import list_joined_spaces
from t5tune.file_names import TOKENIZER_CONFIG_FILE
from t5tune.io.atomic import write_json
from t5tune.io.untrusted import read_json_object

# `$name$` is replaced with a value. `read` makes the replacements of cleaning.normalize_text.
_SOURCE = r"""
{%- macro read(text) -%}
  {%- set text = text.replace('\r\n', '\n').replace('\r', '\n') -%}
  {{- text.replace('\u200b', '').replace('\u2060', '').replace('\ufeff', '') -}}
{%- endmacro -%}
{%- if tools -%}
  {{- raise_exception('tools: this chat template can\'t describe tools; write them into a message') -}}
{%- endif -%}
{%- for message in messages if message['content'] is not string or message['tool_calls'] -%}
  {{- raise_exception('a message of role ' ~ message['role'] ~ ': expected text as content, and no tool_calls') -}}
{%- endfor -%}
{%- set has_system = messages[0]['role'] in $system_roles$ -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- set system = (read(messages[0]['content']) if has_system else '') or $system_message$ -%}
{%- set result = namespace(text=$before_system$ ~ system ~ $after_system$ if system else '') -%}
{%- for message in turns -%}
  {%- set content = message['content'] -%}
  {%- if message['role'] not in ($assistant_roles$ if loop.index0 % 2 else $human_roles$) -%}
    {{- raise_exception('expected user and assistant messages in turn, found one of role ' ~ message['role']) -}}
  {%- elif loop.index0 % 2 -%}
    {%- set result.text = result.text ~ $before_assistant$ ~ read(content) ~ $after_assistant$ -%}
  {%- else -%}
    {%- set prefix = '' if content.startswith($source_prefix$) else $source_prefix$ -%}
    {%- set separator = '' if loop.first else $turn_separator$ -%}
    {%- set result.text = result.text ~ separator ~ $before_human$ ~ read(prefix ~ content) ~ $after_human$ -%}
  {%- endif -%}
{%- endfor -%}
{%- if not add_generation_prompt -%}
  {{- result.text -}}
{%- elif turns | length % 2 == 0 -%}
  {{- raise_exception('add_generation_prompt: the last message must be the user\'s') -}}
{%- else -%}
  {%- set source = result.text ~ $assistant_prefix$ -%}
  {{- source_start -}}
  {{- source[:-1] if $ends_in_space$ else source -}}
  {{- source_end -}}
{%- endif -%}
"""


def build_chat_template(template: Template, tokenizer: Tokenizer, source_prefix: str = "") -> str:
    """Build the Jinja source of a chat template; as `chat`, it adds `source_prefix` to human messages that lack it."""
    values: dict[str, Any] = {f"{speaker}_roles": roles for speaker, roles in ROLES.items()}
    patterns = {
        "system": template.system,
        "human": template.human,
        "assistant": template.assistant_prefix + template.assistant,
    }
    for speaker, pattern in patterns.items():
        values[f"before_{speaker}"], _, values[f"after_{speaker}"] = pattern.rpartition("{text}")
    values |= {
        "system_message": template.system_message,
        "turn_separator": template.turn_separator,
        "assistant_prefix": template.assistant_prefix,
        "source_prefix": source_prefix,
        # where a space is part of the next word's token, the space after the source belongs to the target
        "ends_in_space": (template.assistant_prefix or values["after_human"]).endswith(list_joined_spaces(tokenizer)),
    }
    special = tokenizer.special_ids
    start, end = (_spell_out(tokenizer, ids) for ids in (special.source_start, special.source_end))
    source = _SOURCE.replace("  {{- source_start -}}\n", f"  {{{{- {start} -}}}}\n" if special.source_start else "")
    source = source.replace("  {{- source_end -}}\n", f"  {{{{- {end} -}}}}\n" if special.source_end else "")
    # Python's notation of strings, tuples and bools is also Jinja's
    return re.sub(r"\$(\w+)\$", lambda match: repr(values[match[1]]), source).strip()


def _spell_out(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    if ids == (tokenizer.eos_token_id,):
        return "eos_token"
    return repr("".join(tokenizer.backend.id_to_token(index) for index in ids))


def write_chat_template(folder: Path, source: str, tokenizer: Tokenizer) -> None:
    """Add a chat template to the tokenizer's files in a folder, as a key that transformers 4 and 5 read."""
    config = read_json_object(folder, TOKENIZER_CONFIG_FILE) | {"chat_template": source}
    if tokenizer.backend is None:
        # ByT5Tokenizer would remove the whitespace before an EOS token
        end = {"content": tokenizer.eos_token, "special": True}
        end |= dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        known = config.get("added_tokens_decoder") or {}
        config["added_tokens_decoder"] = known | {str(tokenizer.eos_token_id): end}
    write_json(folder / TOKENIZER_CONFIG_FILE, config)
