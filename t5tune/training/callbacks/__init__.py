"""The callbacks of the Trainer that report, upload and track a run. flow.py decides what follows a step."""
