"""The one exception for mistakes of the user: programs print it as one line and exit with 2."""


class UserError(ValueError):
    """A mistake the user can mend; the message says what is wrong, where, and how to mend it."""
