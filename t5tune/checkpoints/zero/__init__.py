"""DeepSpeed's shards of a checkpoint."""
