"""The arguments of a program: flags that it does not know, and places that it cannot write to."""

from __future__ import annotations

import argparse
import errno
import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from ppo_nlu.config import Config, shipped
from ppo_nlu.config.mistakes import meant
from ppo_nlu.errors import UserError
from ppo_nlu.runtime.streams import tell


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a mistake in one line, as all of this package does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._hint(message)}; see {self.prog} --help")

    def _hint(self, message: str) -> str:
        """What an unknown flag probably meant: another flag, or a key of the config."""
        found = re.search(r"unrecognized arguments: (--?[\w.-]+)", message)
        if found is None:
            return ""
        key = found[1].lstrip("-").replace("-", "_")
        near = get_close_matches(found[1], list(self._option_string_actions), n=1)
        if near:
            return f"; did you mean {near[0]}?"
        text = meant(Config, key)
        return f"; keys of the config are given as section.key=value: {text}" if text else ""


def config_file(text: str) -> str:
    """The path of a config that the user names: of one that comes with the package, if there is no
    such file here. Use it as the `type` of an argument."""
    found = None if os.path.lexists(text) else shipped.find(text)
    if found is None:
        return text
    tell(f"note: there is no {text} here; the one that comes with the package is taken: {found}")
    return str(found)


def require_place(flag: str, path: Path) -> Path:
    """The path, if a file or folder can be made there; else a UserError, before minutes of work."""
    above = path.absolute()
    try:
        while not os.path.lexists(above):
            above = above.parent
        if above != path.absolute() and not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{above} is not a folder")
        if not os.access(above, os.W_OK):
            raise PermissionError(errno.EACCES, f"{above} may not be written to")
        there = above if above.is_dir() else above.parent
        limit, whole = os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX")
    except OSError as error:
        reason = f"cannot be written ({error.strerror}, so it cannot be made); check the folder"
        raise UserError(f"{flag} {path}: {reason}") from error
    # The rest is for temporary names, and for the files inside.
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > limit - 40 or len(os.fsencode(path.absolute())) > whole - 200:
        raise UserError(f"{flag} {path}: the name is too long; give a shorter one")
    return path
