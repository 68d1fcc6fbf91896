"""Loops to read and to copy, each in one file beside the library's own."""
