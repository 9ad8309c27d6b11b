"""The code that a saved model carries, in one flat folder.

With ``trust_remote_code=True`` Transformers loads a model whose code is beside its weights. Its loader knows files,
not folders: for ``from .layers.kl import x`` it looks for a file ``layers.kl.py``. This package has folders, so saving
a model flattens them: ``layers/kl.py`` becomes ``layers_kl.py``, and the imports in every file change accordingly.
Code loaded from such a flat folder is saved unchanged.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from transformers.utils import logging

from ..files import write_whole

logger = logging.get_logger(__name__)

_UNFINISHED: ContextVar[bool] = ContextVar("unfinished", default=False)


def flattened(file: Path) -> dict[str, str]:
    """The sources of a module and of all that it imports relatively, by the names of their flat files.

    Args:
        file: the module's file. It can import modules beside and below it.
    """
    root, sources, waiting = file.parent, {}, [file]
    while waiting:
        module = waiting.pop()
        name = _flat_name(module, root)
        if name in sources:
            continue
        source = module.read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            assert node.module is not None, f"{module} imports from a folder: name the module"
            imported = module.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            waiting.append(imported)
            written = f"from {'.' * node.level}{node.module} import"
            flat = f"from .{_flat_name(imported, root).removesuffix('.py')} import"
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(written, flat, 1)
        sources[name] = "".join(lines)
    return sources


def _flat_name(file: Path, root: Path) -> str:
    return "_".join(file.relative_to(root).parts)


def owner_of_code(cls: type) -> type:
    """The class whose file is saved: ``cls``, or its parent if ``cls`` has no file or is made at run time."""
    owner = next(c for c in cls.__mro__ if c.__module__ != "__main__" and not c.__module__.startswith("torch."))
    if cls.__module__ == "__main__":
        logger.warning(
            f"{cls.__name__} is defined in __main__, so its code cannot be saved. The folder has the code of "
            f"{owner.__name__}. To save your class, put it into a module of its own."
        )
    return owner


def auto_map_entry(cls: type) -> str:
    """A configuration's entry for the code of a class: ``"modeling_nvib.NvibForConditionalGeneration"``."""
    owner = owner_of_code(cls)
    return f"{owner.__module__.rsplit('.', 1)[-1]}.{owner.__name__}"


def save_code(cls: type, folder: str | os.PathLike) -> None:
    """Write the file of a class and all that it imports relatively into a folder, flat."""
    file = sys.modules[owner_of_code(cls).__module__].__file__
    assert file is not None, f"{cls.__name__} is in no file"
    for name, source in flattened(Path(file)).items():
        write_whole(Path(folder, name), source)


# If saving is interrupted, the folder must not load as a mixture of two models. So the configuration must be the last
# file. Transformers itself writes it first, so it has another name until the weights are written.


@contextmanager
def written_last(file: Path) -> Iterator[None]:
    """Remove a folder's ``config.json``. The new one gets this name when everything inside the block is written."""
    file.unlink(missing_ok=True)
    token = _UNFINISHED.set(True)
    try:
        yield
    finally:
        _UNFINISHED.reset(token)
    put_in_place(file)


def name_until_finished(file: Path) -> Path:
    """The path to write a configuration to: another name while its model is being saved."""
    return _aside(file) if _UNFINISHED.get() else file


def put_in_place(file: Path) -> None:
    """Give a configuration its final name, if it was written under another."""
    if _aside(file).exists():
        _aside(file).replace(file)


def _aside(file: Path) -> Path:
    return file.with_name(f"{file.name}.unfinished")
