"""The version of t5tune."""

__version__ = "0.1.0"
