"""Callbacks of the Trainer that report, upload and track a run. flow.py has the decisions after a step."""
