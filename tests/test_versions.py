"""The range of versions: stated once, and a version outside of it is said."""

import configparser
import logging
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import START, tiny_base, tiny_inputs, tiny_labels
from tiny_nvib import tiny_nvib
from transformers import DynamicCache, EncoderDecoderCache
from transformers.utils import logging as hf_logging

from nvib_hf import NvibForConditionalGeneration, versions
from nvib_hf.versions import TESTED_TRANSFORMERS, warn_if_untested

ROOT = Path(__file__).parents[1]


@pytest.fixture
def unwarned():
    warn_if_untested.cache_clear()
    yield
    warn_if_untested.cache_clear()


def test_setup_cfg_and_the_readme_state_the_tested_range():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert f"transformers{TESTED_TRANSFORMERS}" in setup["options"]["install_requires"].split()
    assert f"`transformers{TESTED_TRANSFORMERS}`" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"'transformers{TESTED_TRANSFORMERS}'" in (ROOT / "nvib_hf/__init__.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("version", ["5.17.0", "5.25.0", "6.0.0"])
def test_a_version_that_is_not_tested_is_warned_of_once(unwarned, monkeypatch, tmp_path, version):
    monkeypatch.setattr(versions.transformers, "__version__", version)
    with pytest.warns(UserWarning, match=f"not tested with this version.*transformers {version}"):
        model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NvibForConditionalGeneration.from_pretrained(tmp_path)
    warn_if_untested.cache_clear()
    with pytest.warns(UserWarning, match="not tested"):
        NvibForConditionalGeneration.from_pretrained(tmp_path)


def test_the_installed_version_is_not_warned_of(unwarned):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested()


@pytest.mark.parametrize("family", ["bart", "t5", "bert2gpt2", "whisper"])
def test_nothing_deprecated_is_used(family):
    """Transformers announces most of it through its logger, once a process."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger, verbosity = hf_logging.get_logger("transformers"), hf_logging.get_verbosity()
    hf_logging.set_verbosity_warning()
    logging.Logger.warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        model, inputs = NvibForConditionalGeneration.from_base_pretrained(tiny_base(family)), tiny_inputs(family)
        model.train()(**inputs, labels=tiny_labels(family)).loss.backward()
        model.eval()(**inputs, labels=tiny_labels(family))
        for settings in ({}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
            model.generate(**inputs, max_new_tokens=3, **settings)
        logger.warning("heard")
    finally:
        logger.removeHandler(handler)
        hf_logging.set_verbosity(verbosity)
    assert said[-1] == "heard"
    assert not [message for message in said if "deprecat" in message.lower()]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # as of the base
def test_a_cache_has_two_names():
    model, tokens = tiny_nvib(), torch.tensor([[START, 5, 6]])
    latents = model.encode(torch.tensor([[5, 6, 2]]))
    for name in ("cache", "past_key_values"):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        output = model(encoder_outputs=latents, decoder_input_ids=tokens, **{name: cache})
        assert output[versions.CACHE] is cache and cache.get_seq_length() == 3
    if versions.CACHE == "cache":  # where one of the names is old, Transformers says which one it takes
        with pytest.warns(FutureWarning, match="Both `"):
            model(encoder_outputs=latents, decoder_input_ids=tokens, cache=cache, past_key_values=cache)
    assert versions.CACHE in ("cache", "past_key_values")
