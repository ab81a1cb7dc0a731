"""One module per command, with a function of its name that takes settings and a report, and returns a result."""
