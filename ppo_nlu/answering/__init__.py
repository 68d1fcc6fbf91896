"""A trained run answers: loading it, asking it, and measuring its answers."""
