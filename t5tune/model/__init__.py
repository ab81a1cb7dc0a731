"""Load a base checkpoint into a model that is ready for training or inference."""
