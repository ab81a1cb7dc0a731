"""A base checkpoint -> a model ready to train."""
