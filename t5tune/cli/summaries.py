"""What the help says of each command. Separate from the settings, so that `t5tune --help` needs no pydantic."""

SUMMARIES = {
    "prepare": "Check and tokenize data before training; train does it too.",
    "train": "Fine-tune a model on your data, with LoRA, QLoRA or in full.",
    "export": "Turn a training checkpoint into an adapter in PEFT's format.",
    "merge": "Merge an adapter into its base model.",
    "chat": "Chat with a base model, an adapter or a training run.",
    "serve": "Serve models over HTTP, for clients of OpenAI's API.",
    "inspect": "Show prepared data as the model sees it.",
    "evaluate": "Score a model's predictions against a dataset's targets.",
    "push": "Upload an adapter or a merged model to the Hugging Face Hub.",
    "plan": "Estimate a training run's memory and steps before you start it.",
    "doctor": "Check what works on this machine, and how to fix what doesn't.",
    "templates": "List, show or copy the templates that come with t5tune.",
    "schema": "Print the JSON schema of a command's YAML, for editors.",
    "docs": "Print all that a coding assistant needs to use t5tune.",
}

# purpose: command; all of them work as typed, the last one once the file exists
FIRST_STEPS = {
    "Train the built-in model (1 to 3 minutes; nothing to download):": "t5tune train --config pocket --output-dir run",
    "Chat with it:": "t5tune chat run",
    "Train a published model on your own data, here chats.jsonl:": "t5tune train --model-name-or-path "
    "google/flan-t5-base --data-path chats.jsonl --learning-rate 3e-4 --output-dir tuned",
}

# two for each command; those with pocket, run and cache work in this order, in an empty folder
EXAMPLES = {
    "prepare": (
        "t5tune prepare --model-name-or-path pocket --data-path pocket --output-dir cache",
        "t5tune prepare --model-name-or-path google/flan-t5-base --data-path chats.jsonl --output-dir cache",
    ),
    "train": (
        "t5tune train --config pocket --output-dir run",
        "t5tune train --model-name-or-path google/flan-t5-base --data-path chats.jsonl --learning-rate 3e-4 "
        "--output-dir tuned",
    ),
    "export": (
        "t5tune export run --output-dir adapter",
        "t5tune export run --output-dir adapter --dtype bfloat16 --overwrite",
    ),
    "merge": (
        "t5tune merge run --output-dir merged",
        "t5tune merge run --dtype bfloat16 --output-dir merged-bf16",
    ),
    "chat": (
        "t5tune chat run",
        't5tune chat run --prompt "Could you bring six coffees and six teas to Aida?"',
    ),
    "serve": (
        "t5tune serve run",
        "t5tune serve base=google/flan-t5-base tuned=run --quantization int8",
    ),
    "inspect": (
        "t5tune inspect cache --stats",
        "t5tune inspect cache --html examples.html",
    ),
    "evaluate": (
        "t5tune evaluate run --data-path pocket --num-data 100",
        "t5tune evaluate run --data-path dev.csv --source-column question --target-column answer",
    ),
    "push": (
        "t5tune push run owner/name",
        "t5tune push merged owner/name --hub-private-repo",
    ),
    "plan": (
        "t5tune plan --config pocket",
        "t5tune plan --model-name-or-path google/flan-t5-large --bf16 --gpu-memory 24GiB",
    ),
    "doctor": (
        "t5tune doctor",
        "t5tune doctor --json",
    ),
    "templates": (
        "t5tune templates",
        "t5tune templates copy pocket my-run.yaml",
    ),
    "schema": (
        "t5tune schema",
        "t5tune schema prepare > prepare.schema.json",
    ),
    "docs": (
        "t5tune docs",
        "t5tune docs > t5tune.md",
    ),
}
