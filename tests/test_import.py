"""`import nvib_hf` needs torch alone, and says what to install where more is asked of it."""

import subprocess
import sys
from pathlib import Path

import pytest

import nvib_hf

# As on a machine without these packages: no finder finds them.
WITHOUT_TRANSFORMERS = """
import importlib.machinery, sys
ABSENT = {"transformers", "accelerate", "datasets", "safetensors", "tokenizers", "huggingface_hub", "peft"}
find_spec = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, *args, **kwargs: None if name.partition(".")[0] in ABSENT else find_spec(name, *args, **kwargs)
)
try:
    import transformers
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("transformers is still there")
"""


def run(code: str) -> str:
    """Standard output of a fresh interpreter without transformers."""
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSFORMERS + code],
        cwd=Path(nvib_hf.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_layer_needs_torch_alone():
    """Every module of the plain layer, and the published walk-through: layer, decoder, divergences, sample."""
    output = run(
        """
import importlib
import pkgutil
import torch, nvib_hf, nvib_hf.layers
modules = [name for _, name, _ in pkgutil.iter_modules(nvib_hf.layers.__path__, "nvib_hf.layers.")]
assert {"nvib_hf.layers.nvib", "nvib_hf.layers.kl", "nvib_hf.layers.published"} < set(modules)
for name in [*modules, "nvib_hf.loss"]:
    importlib.import_module(name)
from nvib_hf import *
for name in nvib_hf.__all__:
    assert getattr(nvib_hf, name) is globals()[name]
layer = Nvib(8, 8)
latent = layer(torch.randn(5, 2, 8), torch.zeros(2, 5, dtype=torch.bool))
decoder = torch.nn.TransformerDecoderLayer(8, 2)
decoder.multihead_attn = DenoisingMultiheadAttention(8, 2)
output = decoder(torch.randn(3, 2, 8), latent["z"])
(output.sum() + kl_gaussian(**latent).sum() + layer.kl_dirichlet(**latent).sum()).backward()
decoder(torch.randn(3, 2, 8), layer.sample(2, latent["memory_key_padding_mask"]))
assert not ABSENT & set(sys.modules), ABSENT & set(sys.modules)
print(*nvib_hf.__all__)
"""
    )
    assert set(output.split()) == {
        "DenoisingMultiheadAttention",
        "EmpiricalPrior",
        "Nvib",
        "NvibMemory",
        "denoising_attention",
        "empirical_prior",
        "kl_dirichlet",
        "kl_gaussian",
        "naive_denoising_attention",
    }


def test_the_hugging_face_names_say_what_to_install():
    output = run(
        """
import nvib_hf
for ask in ("nvib_hf.NvibConfig", "nvib_hf.NvibForConditionalGeneration", "nvib_hf.NvibTrainer"):
    try:
        eval(ask)
    except ImportError as error:
        print(error)
try:
    from nvib_hf import NvibConfig
except ImportError as error:
    print(error)
try:
    nvib_hf.NvibConfiguration
except AttributeError as error:
    print("AttributeError", error)
"""
    )
    *errors, misspelt = output.splitlines()
    names = ["NvibConfig", "NvibForConditionalGeneration", "NvibTrainer", "NvibConfig"]
    assert len(errors) == 4
    for name, error in zip(names, errors, strict=True):
        assert error.startswith(f"nvib_hf.{name} needs the package transformers")
        assert "pip install 'transformers" in error
    assert misspelt == "AttributeError module 'nvib_hf' has no attribute 'NvibConfiguration'"


@pytest.mark.parametrize("name", nvib_hf.__all__)
def test_every_public_name_is_there_and_documented(name):
    """In words: what a dataclass or a configuration without a docstring gets for one is its signature."""
    documentation = getattr(nvib_hf, name).__doc__
    assert documentation and not documentation.startswith(f"{name}(")
