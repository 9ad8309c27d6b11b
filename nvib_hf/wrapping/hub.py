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
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)


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
    for name, source in flattened(Path(sys.modules[owner_of_code(cls).__module__].__file__)).items():
        Path(folder, name).write_text(source, encoding="utf-8")
