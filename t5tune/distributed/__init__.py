"""The ranks of a run: starting them, their process group, collectives, and signals."""
