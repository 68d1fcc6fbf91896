"""Shared prefixes run once: the tree of tokens and the attention over it."""
