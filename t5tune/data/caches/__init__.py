"""Token caches, and the examples of several of them."""
