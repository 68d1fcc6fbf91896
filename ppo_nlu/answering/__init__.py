"""A trained run answers: loading it, asking it, and what it was made of."""
