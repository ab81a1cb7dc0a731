"""Train one model: batches, steps, evaluation, checkpoints, and resuming from them."""
