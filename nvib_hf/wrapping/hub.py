"""The code that a saved model carries, in one flat folder.

With ``trust_remote_code=True`` Transformers loads a model whose code lies beside its weights. Its loader knows files,
not folders: for ``from .layers.kl import x`` it looks for a file ``layers.kl.py``. This package has folders. So they
are flattened when a model is saved: ``layers/kl.py`` becomes ``layers_kl.py``, and the imports in every file follow.
Code that was loaded from such a folder is flat already, and is saved from there as it is.
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
    """A module and all that it imports relatively: their sources by the names of their flat files.

    Args:
        file: the module's; modules beside and below it can be imported.
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
    """The class whose file is saved: ``cls``, or what it derives from if it has no file or is made at run time."""
    owner = next(c for c in cls.__mro__ if c.__module__ != "__main__" and not c.__module__.startswith("torch."))
    if cls.__module__ == "__main__":
        logger.warning(
            f"{cls.__name__} is defined in __main__, so its code cannot be saved. The folder brings the code of "
            f"{owner.__name__}. Put your class into a module of its own to save that."
        )
    return owner


def auto_map_entry(cls: type) -> str:
    """Where a configuration says that the code of a class is: ``"modeling_nvib.NvibForConditionalGeneration"``."""
    owner = owner_of_code(cls)
    return f"{owner.__module__.rsplit('.', 1)[-1]}.{owner.__name__}"


def save_code(cls: type, folder: str | os.PathLike) -> None:
    """Write the file of a class and all that it imports relatively into a folder, flat."""
    file = sys.modules[owner_of_code(cls).__module__].__file__
    assert file is not None, f"{cls.__name__} is in no file"
    for name, source in flattened(Path(file)).items():
        write_whole(Path(folder, name), source)


# What was interrupted must not load as a mixture of two models, so the configuration is the last file of a model.
# Within Transformers' own saving it is the first: until the weights are there it has another name.


@contextmanager
def written_last(file: Path) -> Iterator[None]:
    """Remove a folder's ``config.json``; what is saved within appears under that name when all has been written."""
    file.unlink(missing_ok=True)
    token = _UNFINISHED.set(True)
    try:
        yield
    finally:
        _UNFINISHED.reset(token)
    put_in_place(file)


def name_until_finished(file: Path) -> Path:
    """Where to write a configuration: elsewhere, while its model is being saved."""
    return _aside(file) if _UNFINISHED.get() else file


def put_in_place(file: Path) -> None:
    """Give a configuration its name, if it was written elsewhere."""
    if _aside(file).exists():
        _aside(file).replace(file)


def _aside(file: Path) -> Path:
    return file.with_name(f"{file.name}.unfinished")
