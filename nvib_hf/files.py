"""Writing files completely or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file in one step. Readers find the old file or the new one, even if writing is interrupted.

    The content goes into a file with a unique name in the same folder, which then replaces the old file. A link itself
    is replaced, not the file that it points to. An old file's mode is kept.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    data = content.encode("utf-8") if isinstance(content, str) else content
    # O_EXCL creates the file or fails: it opens no existing file, and follows no link.
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        if path.exists() and stat.S_ISREG((there := path.lstat()).st_mode):
            unfinished.chmod(stat.S_IMODE(there.st_mode))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
