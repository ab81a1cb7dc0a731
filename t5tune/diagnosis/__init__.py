"""What doctor tries, each thing in a process of its own: `python -m t5tune.diagnosis.probes NAME`."""
