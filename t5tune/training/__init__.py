"""One model, some processes, many steps."""
