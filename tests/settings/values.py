"""Settings that tests of loading share."""

NEEDED = {"model_name_or_path": "pocket", "data_path": "pocket", "output_dir": "run"}
NEEDED_FLAGS = ["--model-name-or-path", "pocket", "--data-path", "pocket", "--output-dir", "run"]
