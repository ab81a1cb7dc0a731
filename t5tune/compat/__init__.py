"""Minimum versions of dependencies, and patches of them. Each says what breaks without it, and in which releases."""
