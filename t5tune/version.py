"""The version of t5tune."""

__version__ = "0.2.0"
