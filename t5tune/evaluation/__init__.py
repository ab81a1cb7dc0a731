"""The examples of an evaluation, their batches, and their scores."""
