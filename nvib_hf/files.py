"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file in one step: whoever reads it, and whatever interrupts this, finds the old one or the new one.

    It is written under a name of its own in the same folder, which nobody else can have made, and then takes the place
    of what was there: of a link, not of what that points to. The mode of a file that was there is kept.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    data = content.encode("utf-8") if isinstance(content, str) else content
    # O_EXCL makes the file or fails: it opens none that is there, and follows no link.
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        if path.exists() and stat.S_ISREG((there := path.lstat()).st_mode):
            unfinished.chmod(stat.S_IMODE(there.st_mode))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
