"""Measurements anyone can repeat; each file but the helpers is a program, see its head."""
