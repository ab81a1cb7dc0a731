"""Faster implementations of attention, adapters and activations."""
