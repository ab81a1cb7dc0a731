"""Files and processes: atomic writes, untrusted files, YAML, error texts. Knows nothing about models or data."""
