"""What differs between the versions of Transformers that this package runs with, and which those are."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.modeling_outputs import Seq2SeqLMOutput

# The suite runs on the first and the last of them; setup.cfg asks for the same.
TESTED_TRANSFORMERS = ">=5.18,<5.25"

# The cache: as an argument of models, layers and attention, in their outputs and in what generate() hands on.
# `past_key_values` until 5.23, `cache` since.
CACHE = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"

# Where the package is installed from, "https://.../nvib_hf": the one place to fill in. Until then the code of a saved
# model comes with its weights.
ADDRESS = ""
UPDATE = f"Update with `pip install -U {f'git+{ADDRESS}' if ADDRESS else '.'}`" + (
    "." if ADDRESS else " in its newer source."
)


class ConfigOfABase(PreTrainedConfig):
    """A configuration with that of another model in it, of BART if none is given."""

    base_config: PreTrainedConfig | dict | None = None

    if hasattr(PreTrainedConfig, "sub_configs_defaults"):
        from transformers.configuration_utils import SubConfigSpec as _Part

        sub_configs_defaults = {"base_config": _Part(config_class=AutoConfig, model_type="bart")}
    else:  # until 5.19: parts are declared, but made by their owner, and a part with parts has no defaults to omit
        sub_configs = {"base_config": AutoConfig}

        def __post_init__(self, **kwargs) -> None:
            if not isinstance(self.base_config, PreTrainedConfig):
                given = {"model_type": "bart", **(self.base_config or {})}
                self.base_config = CONFIG_MAPPING[given["model_type"]](**given)
            super().__post_init__(**kwargs)

        def to_diff_dict(self) -> dict:
            return self.to_dict()


def old_name_of_the_cache(forward: Callable) -> Callable:
    """Let a forward take ``past_key_values`` where that is an old name, with the warning that the base gives."""
    if CACHE == "past_key_values":
        return forward
    from transformers.utils.deprecation import deprecate_kwarg

    return deprecate_kwarg("past_key_values", "5.40.0", new_name=CACHE)(forward)


def installed_and_tested() -> str:
    """For a message: which version is installed and which ones are tested."""
    return f"Installed is transformers {transformers.__version__}, tested are {TESTED_TRANSFORMERS}"


@functools.cache
def warn_if_untested() -> None:
    """Warn, once, that the installed Transformers is not one that the tests run on."""
    lowest, beyond = (Version(bound.lstrip("><=")) for bound in TESTED_TRANSFORMERS.split(","))
    if not lowest <= Version(transformers.__version__) < beyond:
        warnings.warn(
            f"nvib_hf is not tested with this version of Transformers. {installed_and_tested()}. What a model "
            "computes may differ: compare a fresh wrap with its base, or install a tested version.",
            stacklevel=3,
        )
