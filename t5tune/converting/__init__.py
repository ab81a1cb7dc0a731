"""Convert a checkpoint for other tools."""

import os

# onnxruntime 1.29 and later tell Microsoft the names and hashes of models, unless this is set before they are imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
