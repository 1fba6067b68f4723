"""Files of a checkpoint as they lie on disk: whether they are there, and their bytes. No torch.

A snapshot that was copied without what its links lead to, a folder that may not be entered, a pipe in the place of a
file: none of these counts as a file that is simply not there, or a model would be read without its settings.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from embedserve.models.errors import CheckpointError


def present(path: Path) -> bool:
    """Whether there is anything of this name, also a link that leads nowhere.

    Raises CheckpointError if that cannot be found out.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be looked at ({error.strerror}); check its permissions") from error
    return True


def read_file(path: Path, most: int) -> bytes:
    """Read a file of at most `most` bytes. Raises CheckpointError if it is larger, and as `open_file`."""
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise CheckpointError(f"{path}: larger than {most >> 20} MiB, which no such file is; copy it again")
    return content


def open_file(path: Path) -> BinaryIO:
    """Open a file to read it. Raises CheckpointError if it is missing, unreadable, or not a regular file."""
    try:
        # Not waiting: whoever opens a pipe would wait for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if present(path):
            raise CheckpointError(f"{path}: a link that leads nowhere; copy what it should lead to") from None
        raise CheckpointError(f"{path}: the file is missing; copy the whole checkpoint folder") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a regular file; copy the whole checkpoint folder")
    return os.fdopen(descriptor, "rb")
