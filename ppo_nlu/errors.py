"""The one exception for mistakes of the user: programs print it as one line and exit with 2."""

LONGEST = 560  # characters of a line of error


class UserError(ValueError):
    """A mistake the user can mend; the message says what is wrong, where, and how to mend it."""


def one_line(text: str, longest: int = LONGEST) -> str:
    """The text on one line: control characters escaped, the middle of a long one left out.

    The place stands at the head of a message and the mend at its end, so both are kept.
    """
    shown = "".join(_printable(char) for char in " ".join(text.split()))
    if len(shown) <= longest:
        return shown
    tail = longest // 2
    return f"{shown[: longest - tail - 5]} ... {shown[-tail:]}"


def _printable(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
