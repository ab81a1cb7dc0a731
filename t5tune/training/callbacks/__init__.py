"""The callbacks of the Trainer that report, upload and track a run. What follows a step is in flow.py."""
