"""The commands' names, and what each is for. Kept apart from the settings, so that `--help` needs no pydantic."""

SUMMARIES = {
    "prepare": "Turn conversations into a token cache.",
    "train": "Train a LoRA or QLoRA adapter.",
    "export": "Gather a checkpoint's shards into an adapter.",
    "merge": "Fold an adapter into its base checkpoint.",
    "chat": "Talk to a base, an adapter, a run or a merged checkpoint.",
    "inspect": "Show what the model will really see of a token cache.",
    "evaluate": "Score a model's answers on examples that have true ones.",
    "plan": "Tell what a run will take, before it runs.",
    "doctor": "Tell what on this machine works, and how to mend what doesn't.",
    "templates": "List, show or copy what comes with t5tune.",
    "schema": "Print the JSON schema of a command's YAML, for editors.",
}
