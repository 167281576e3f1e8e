"""What is said to the user: where it can't be written, as into a file on a full disk, it is lost, and nothing else."""

import contextlib
import os
import sys

UNWRITABLE = (OSError, ValueError)  # closed, or without such letters


def say(*texts: object, sep: str = " ") -> None:
    """Prints."""
    with contextlib.suppress(*UNWRITABLE):
        print(*texts, sep=sep, flush=True)


def warn(text: str) -> None:
    """Prints on stderr, which the user sees wherever standard output goes."""
    with contextlib.suppress(*UNWRITABLE):
        print(text, file=sys.stderr, flush=True)


def drop_unsaid() -> None:
    """Forgets what couldn't be written, for which Python would end with 120, whatever the exit code was to be."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except UNWRITABLE:
            with contextlib.suppress(*UNWRITABLE), open(os.devnull, "w") as null:
                os.dup2(null.fileno(), stream.fileno())
