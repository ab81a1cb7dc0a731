"""The name of each command and its one-line summary. Separate from the settings, so that `--help` needs no pydantic."""

SUMMARIES = {
    "prepare": "Tokenize conversations into a token cache.",
    "train": "Fine-tune with LoRA or QLoRA, or in full.",
    "export": "Gather a checkpoint's shards into an adapter.",
    "merge": "Merge an adapter into its base checkpoint.",
    "chat": "Chat with a base, an adapter, a run or a merged checkpoint.",
    "inspect": "Show the examples in a token cache as the model sees them.",
    "evaluate": "Score a model's predictions against a dataset's targets.",
    "plan": "Estimate memory and steps of a training run beforehand.",
    "doctor": "Check what works on this machine, and how to fix what doesn't.",
    "templates": "List, show or copy the templates that come with t5tune.",
    "schema": "Print the JSON schema of a command's YAML, for editors.",
}
