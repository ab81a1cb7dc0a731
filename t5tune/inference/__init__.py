"""Load a model to use it: its precision, its prompts, its replies."""
