"""Write a token cache: in one process, or in parts on many nodes that are joined."""
