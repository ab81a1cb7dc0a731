"""From conversation files to examples in the token cache. Nothing here imports torch."""
