"""Find the class of a base model by the name in a configuration, without importing anything for it."""

from __future__ import annotations

import importlib
import sys
import warnings

import transformers
from transformers import PreTrainedModel

OR_ANOTHER = (
    "Or pass base_architecture=..., the class of Transformers that the base is or derives from, such as "
    "'BartForConditionalGeneration'. The methods of that class then replace your own."
)


def architecture_name(model_class: type[PreTrainedModel]) -> str:
    """``"BartForConditionalGeneration"`` for a class of Transformers, ``"my_models:MyBart"`` for any other class."""
    if getattr(transformers, model_class.__name__, None) is model_class:
        return model_class.__name__
    return f"{model_class.__module__}:{model_class.__qualname__}"


def architecture_class(name: str) -> type[PreTrainedModel]:
    """The class with this name.

    It never imports a module from outside Transformers, because a saved file could name any module.

    Raises:
        ValueError: there is no such class, or its module has not been imported.
    """
    module_name, _, qualified = name.rpartition(":")
    if not module_name:
        found = getattr(transformers, name, None)
    elif module_name.startswith("transformers."):
        found = _attribute(importlib.import_module(module_name), qualified)
    elif module_name in sys.modules:
        found = _attribute(sys.modules[module_name], qualified)
    else:
        raise ValueError(
            f"base_architecture is {name!r}, a class of {module_name!r}, which has not been imported. Import it "
            f"before you load the model.{OR_ANOTHER}"
        )
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"base_architecture is {name!r}, but {module_name or 'Transformers'} has no model class of that name. "
            f"{OR_ANOTHER}"
        )
    return found


def _attribute(owner: object, qualified: str) -> object:
    for part in qualified.split("."):
        owner = getattr(owner, part, None)
    return owner


def warn_if_not_found(name: str) -> None:
    """Warn if nobody who loads the saved model can find its base's class."""
    module_name, _, qualified = name.rpartition(":")
    if module_name and (module_name == "__main__" or "<locals>" in qualified):
        where = "a script" if module_name == "__main__" else "a function"
        warnings.warn(
            f"The base's class {qualified} is defined in {where}, so you can load a saved model only where "
            f"{module_name!r} defines it too. Put it into a module of its own, and import that before loading.",
            stacklevel=3,
        )
