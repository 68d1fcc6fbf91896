"""A training run around its loop: how it begins, is saved and resumed, and ends."""
