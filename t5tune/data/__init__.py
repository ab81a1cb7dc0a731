"""Conversation files -> examples, up to the token cache. Nothing here needs torch."""
