"""Faults of the machine: one line that says how to mend them."""

from __future__ import annotations

import errno
import resource
import socket
from pathlib import Path

import pytest
from helpers import THREE_STEPS, ends, forked, raiser

from ppo_nlu import train

FAULTS = {
    "quota": (OSError(errno.EDQUOT, "Quota exceeded", "a/b"), ["disk full: a/b", "make room"]),
    "no name": (OSError(errno.ENOSPC, "No space left"), ["disk full: a file", "No space left"]),
    "broken disk": (OSError(errno.EIO, "I/O error", "a/b"), ["a/b: I/O error", "check"]),
    "two places": (OSError(errno.EXDEV, "cross", "a", None, "b"), ["a -> b: cross"]),
    "busy": (OSError(errno.EBUSY, "Busy", b"a\xff"), ["Busy"]),
    "reset": (ConnectionResetError(errno.ECONNRESET, "reset by peer"), ["reset by", "network"]),
    "too slow": (TimeoutError("timed out"), ["timed out", "check the network"]),
    "no such host": (socket.gaierror(-2, "Name not known"), ["Name not known", "the network"]),
    "a slow disk": (TimeoutError(errno.ETIMEDOUT, "timed out", "a/b"), ["a/b: timed", "disk"]),
    "rust": (ValueError("Io: No space left (os error 28)"), ["disk full: a file"]),
    "rust again": (Exception("IoError(Os { code: 5, kind: x })"), ["Input/output error"]),
    "memory": (MemoryError(), ["out of memory", "rollout.batch_size", "micro_batch_tokens"]),
    "of the system": (OSError(errno.ENOMEM, "no memory"), ["out of memory", "eval.batch_size"]),
    "of torch": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes.\nmore"),
        ["out of memory", "9 bytes", "model.checkpointing"],
    ),
    "of CUDA": (RuntimeError("CUDA out of memory. Tried to allocate"), ["out of memory (CUDA"]),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_of_the_machine_are_one_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, words = FAULTS[kind]
    assert ends(raiser(error)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert "--resume" not in err and not ("the network" in err and "the path" in err)
    for word in words:
        assert word in err


def starved(argv: list[str]) -> int:
    """Training in an address space that holds 256 MiB more than it has already."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = mapped + (1 << 28)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return train.main(argv)


def test_too_little_memory_is_one_line(tmp_path: Path) -> None:
    config, said = tmp_path / "c.yaml", tmp_path / "said.txt"
    config.write_text(THREE_STEPS)
    said.touch()
    arguments = [config, "rollout.batch_size=6000", "--output", tmp_path / "run"]
    assert forked(starved, arguments, "/dev/null", str(said)) == 2
    err = said.read_text()
    assert "error: out of memory" in err and f"--resume {tmp_path}/run" in err
    assert "Traceback" not in err and err.count("error:") == 1
