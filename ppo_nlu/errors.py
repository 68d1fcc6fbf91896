"""The one exception for mistakes of the user: programs print it as one line and exit with 2."""

import unicodedata

LONGEST = 560  # characters of an error's line
SHOWN = 80  # characters of a cell or word that a message quotes


class UserError(ValueError):
    """A mistake that the user can mend; the message says what is wrong, where, and how to mend it.

    What it quotes cannot control the terminal: invisible characters are written out.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text with invisible characters written out, as `\\x1b`; white space stays."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isspace() or unicodedata.category(char) not in HIDDEN else _escaped(char)
        for char in text
    )


# Control and format characters, surrogates, private use, unassigned.
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn")


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def quoted(text: object) -> str:
    """A cell or word in quote marks, shortened where it is long."""
    shown = str(text)
    return repr(shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}...")


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line of what an error says; "" where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0][:longest]


def one_line(text: str, longest: int = LONGEST) -> str:
    """The text on one line: control characters escaped, the middle of a long one left out.

    A message begins with the place of the mistake and ends with how to mend it: both are kept.
    """
    shown = printable(" ".join(text.split()))
    if len(shown) <= longest:
        return shown
    tail = longest // 2
    return f"{shown[: longest - tail - 5]} ... {shown[-tail:]}"
