"""Fine-tune T5-family encoder-decoders with LoRA and QLoRA."""

__version__ = "0.1.0"
