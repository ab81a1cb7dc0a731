"""Turn conversations and texts into token ids."""
