"""Replies that follow a JSON schema, a regular expression, a grammar, or a list of answers."""
