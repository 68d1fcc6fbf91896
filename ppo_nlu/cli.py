"""What every program shares: from how it ended to its exit code and the line on stderr.

Use: `if __name__ == "__main__": sys.exit(cli.run(main))`.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from ppo_nlu.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, as those of all other mistakes are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """The exit code of `main(argv)`: its own, 2 for the user's mistake, 130 for Ctrl-C, else 1."""
    try:
        code = main(sys.argv[1:] if argv is None else argv) or 0
        sys.stdout.flush()  # here, where a reader that has gone is still caught
        return code
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `| head` has seen enough. stdout must not be flushed again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail(f"disk full: {error.filename or 'a file'} could not be written; make room")
        traceback.print_exc()
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
