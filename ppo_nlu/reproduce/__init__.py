"""The tables of the paper: a grid of runs, and the report on it."""
