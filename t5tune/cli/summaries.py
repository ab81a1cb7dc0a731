"""The help of each command without its options. `t5tune --help` needs no settings."""

from rich.console import Console
from rich.markup import escape

MAX_WIDTH = 120  # longer lines are hard to read
MIN_WIDTH = 40
NOTES = (
    "Each --some-setting is also the key some_setting of the --config file, the environment variable "
    "T5TUNE_SOME_SETTING and the argument some_setting=value. A flag overrides the variable, and the variable "
    "overrides the file. A type that ends in … takes one or several values."
)

SUMMARIES = {
    "prepare": "Check and tokenize data before training; train does it too.",
    "train": "Fine-tune a model on your data, with LoRA, QLoRA or in full.",
    "export": "Turn a training checkpoint into an adapter in PEFT's format.",
    "merge": "Merge an adapter into its base model.",
    "trim": "Shrink a base model to the tokens that your data uses.",
    "chat": "Chat with a base model, an adapter or a training run.",
    "serve": "Serve models over HTTP, for clients of OpenAI's API.",
    "inspect": "Show prepared data as the model sees it.",
    "evaluate": "Score a model's predictions against a dataset's targets.",
    "compare": "Compare training runs in a table.",
    "push": "Upload an adapter or a merged model to the Hugging Face Hub.",
    "plan": "Estimate a training run's memory and steps before you start it.",
    "migrate": "Translate a run config of LLaMA-Factory, axolotl or transformers.",
    "doctor": "Check what works on this machine, and how to fix what doesn't.",
    "templates": "List, show or copy the templates that come with t5tune.",
    "schema": "Print the JSON schema of a command's YAML, for editors.",
    "docs": "Print the documentation for coding assistants.",
}

# purpose: command; all work as typed, the last once the file exists
FIRST_STEPS = {
    "Train the built-in model (1 to 3 minutes; nothing to download):": "t5tune train --config pocket --output-dir run",
    "Chat with it:": "t5tune chat run",
    "Train a published model on your own data, here chats.jsonl:": "t5tune train --model-name-or-path "
    "google/flan-t5-base --data-path chats.jsonl --learning-rate 3e-4 --output-dir tuned",
}

# two for each command; commands with pocket, run and cache work in this order, in an empty folder
_EXAMPLES = """
t5tune prepare --model-name-or-path pocket --data-path pocket --output-dir cache
t5tune prepare --model-name-or-path google/flan-t5-base --data-path chats.jsonl --output-dir cache
t5tune train --config pocket --output-dir run
t5tune train --model-name-or-path google/flan-t5-base --data-path chats.jsonl --learning-rate 3e-4 --output-dir tuned
t5tune export run --output-dir adapter
t5tune export run --output-dir adapter --dtype bfloat16 --overwrite
t5tune merge run --output-dir merged
t5tune merge run --dtype bfloat16 --output-dir merged-bf16
t5tune trim merged --data-path pocket --output-dir trimmed
t5tune trim google/mt5-base --data-path chats.jsonl russian.txt --vocab-size 32768 --output-dir mt5-base-ru
t5tune chat run
t5tune chat run --prompt "Could you bring six coffees and six teas to Aida?"
t5tune serve run
t5tune serve base=google/flan-t5-base tuned=run --quantization int8
t5tune inspect cache --stats --html examples.html
t5tune inspect --model-name-or-path google/mt5-small google/byt5-small --data-path chats.jsonl
t5tune evaluate run --data-path run/data
t5tune evaluate run --data-path dev.csv --source-column question --target-column answer
t5tune compare run
t5tune compare sweep --sort-by exact_match --html comparison.html
t5tune push run owner/name
t5tune push merged owner/name --hub-private-repo
t5tune migrate llama3_lora_sft.yaml
t5tune migrate qlora.yml > run.yaml
t5tune plan --config pocket
t5tune plan google/flan-t5-large --bf16 --gpu-memory 24GiB
t5tune doctor
t5tune doctor --json
t5tune templates
t5tune templates copy pocket my-run.yaml
t5tune schema
t5tune schema prepare > prepare.schema.json
t5tune docs
t5tune docs > t5tune.md
"""
EXAMPLES = {name: [line for line in _EXAMPLES.splitlines() if line.split()[1:2] == [name]] for name in SUMMARIES}


def fit_help(width: int | None = None, padding: int = 1) -> int:
    """Set the width of Typer's texts (default: the terminal's) and the padding. Return the width without margins."""
    from typer import rich_utils

    rich_utils.MAX_WIDTH = width or min(max(Console().width, MIN_WIDTH), MAX_WIDTH)
    rich_utils.STYLE_OPTIONS_TABLE_PADDING = (0, padding)
    return rich_utils.MAX_WIDTH - 2


def format_epilog(command: str, everything: bool, num_hidden: int, width: int) -> str:
    """Format the text after a command's options: its examples, and how to see more options."""
    text = "\n".join(["[bold]Examples:[/]", *(format_command_line(line, width) for line in EXAMPLES[command])])
    if everything:
        return f"{text}\n\n{escape(NOTES)}"
    return text + f"\n\nt5tune {command} --help-all lists the other {num_hidden} options." * bool(num_hidden)


def format_first_steps(width: int) -> str:
    lines = ["[bold]Start here:[/]"]
    for number, (purpose, line) in enumerate(FIRST_STEPS.items(), 1):
        lines += [f"{number}. {purpose}", format_command_line(line, width, indent=3)]
    return "\n".join(lines)


def format_command_line(line: str, width: int, indent: int = 0) -> str:
    """Format a command to copy; a long one continues after a backslash, before one of its flags."""
    lines = [" " * indent + line.split(" --")[0]]
    for flag in line.split(" --")[1:]:
        if len(lines[-1]) + len(f" --{flag} \\") > width:
            lines[-1] += " \\"
            lines.append(f"{' ' * (indent + 4)}--{flag}")
        else:
            lines[-1] += f" --{flag}"
    return escape("\n".join(lines))
