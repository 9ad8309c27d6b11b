"""What ``generate``, ``encode`` and ``forward`` take and refuse: as the base of each wrap does."""

import copy
import inspect
import re
import string

import pytest
import torch
from tiny_models import EOS, FAMILIES, PAD, START, VOCAB_SIZE, tiny_base, tiny_inputs, tiny_labels
from tiny_nvib import tiny_nvib
from tiny_training import WITH_PEFT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationMixin,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from nvib_hf import NvibForConditionalGeneration
from nvib_hf.generation_nvib import MODALITIES
from nvib_hf.versions import CACHE

over_families = pytest.mark.parametrize("family", FAMILIES)
LENGTH = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}


def wrap(family, **settings):
    return NvibForConditionalGeneration.from_base_pretrained(tiny_base(family), **settings)


# ----------------------------------------------------------------------------------------------- the base's own inputs
SOURCES = {
    "input_ids": torch.full((3, 9), 5),
    "inputs_embeds": torch.randn(3, 9, 32),
    "input_features": torch.randn(3, 8, 64),
    "input_values": torch.randn(3, 400),
    "pixel_values": torch.randn(3, 3, 12, 12),
}


def names_of(base) -> set[str]:
    """What the base's and its encoder's signatures name."""
    parts = (base.forward, base.get_encoder().forward)
    return {name for part in parts for name in inspect.signature(part).parameters}


@over_families
@torch.no_grad()
def test_another_modality_is_refused_by_name(family):
    """Left out, it would leave a text written from nothing."""
    model = wrap(family)
    others = MODALITIES - names_of(model.base)
    assert others and set(tiny_inputs(family)).isdisjoint(others)
    for name in sorted(others):
        given = {name: SOURCES[name]}
        with pytest.raises(TypeError, match=f"takes no argument '{name}'"):
            model.encode(**given)
        with pytest.raises(TypeError, match=f"takes no argument '{name}'"):
            model(**given, labels=tiny_labels(family))
        message = f"{type(model.base).__name__} does not read {name}. Pass "
        with pytest.raises(ValueError, match=message):
            model.generate(**given, max_new_tokens=2)


@over_families
@torch.no_grad()
def test_its_own_is_taken_by_all_three(family):
    model, inputs = wrap(family), tiny_inputs(family)
    latents = model.encode(**inputs)
    assert model(**inputs, labels=tiny_labels(family)).loss.isfinite()
    assert torch.equal(model.generate(**inputs, **LENGTH), model.generate(encoder_outputs=latents, **LENGTH))
    without = dict.fromkeys(MODALITIES - set(inputs))  # as a collator may leave them
    assert torch.equal(model.generate(**inputs, **without, **LENGTH), model.generate(**inputs, **LENGTH))
    assert torch.equal(model.encode(**inputs, **without).z, latents.z)


@pytest.fixture
def pop2piano():
    """With two composers."""
    base = tiny_base("pop2piano", composer_vocab_size=2)
    base.generation_config.composer_to_feature_token = {"composer1": 10, "composer2": 11}
    return base


@torch.no_grad()
def test_sound_for_pop2piano(pop2piano):
    """In ``forward`` and ``encode`` as in its base: the sound's features are what its encoder reads."""
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(pop2piano))
    sound, labels = {"input_features": torch.randn(2, 7, 32)}, tiny_labels("pop2piano")[:2]
    expected = pop2piano(**sound, labels=labels).logits
    torch.testing.assert_close(model(**sound, labels=labels).logits, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(model.encode(**sound).z, model.encode(inputs_embeds=sound["input_features"]).z)
    written = {}
    for composer in ("composer1", "composer2"):
        for mask in (None, torch.ones(2, 7)):
            given = {**sound, "composer": composer, "attention_mask": mask, **LENGTH}
            written[composer] = pop2piano.generate(**given)
            assert torch.equal(model.generate(**given), written[composer])
            assert torch.equal(model.generate(given.pop("input_features"), **given), written[composer])
    assert not torch.equal(*written.values())
    other = {**sound, "input_features": torch.randn(2, 7, 32)}
    assert not torch.equal(model.generate(**other, **LENGTH), written["composer1"])
    with pytest.raises(ValueError, match="Please choose a composer"):
        model.generate(**sound, composer="nobody", **LENGTH)


@torch.no_grad()
def test_features_for_a_speech_encoder_that_was_joined():
    """Its base hands whatever name it is given by to its encoder."""
    base, inputs = tiny_base("wav2vec2_to_bert"), tiny_inputs("wav2vec2_to_bert")
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base))
    expected = model.encode(**inputs)
    for name in ("input_features", "inputs"):
        renamed = {name: inputs["input_values"], "attention_mask": inputs["attention_mask"]}
        assert torch.equal(model.encode(**renamed).z, expected.z)
        assert torch.equal(
            model(**renamed, labels=tiny_labels("bart")).logits, model(**inputs, labels=tiny_labels("bart")).logits
        )


# -------------------------------------------------------------------------------------------- what generate() takes
def spelling_tokenizer(size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A letter a token, so that a text can stop within a word."""
    letters = [*string.printable[:94], " ", "ä"][: size - 3]
    vocabulary = {"<pad>": PAD, "</s>": EOS, "<s>": START, **{x: i for i, x in enumerate(letters, start=3)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


class Listener(BaseStreamer):
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value)

    def end(self):
        self.heard.append(None)


def own_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, extra=0, **kwargs):
    """A decoding loop of a user's own: greedy, and a number that it alone knows."""
    for _ in range(3):
        inputs = model.prepare_inputs_for_generation(input_ids, **kwargs)
        token = (model(**inputs, return_dict=True).logits[:, -1] + 0 * extra).argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=1)
    return input_ids


def options_of(family: str) -> dict[str, dict]:
    """Arguments of ``generate`` that are not of its configuration, by name."""
    tokenizer = spelling_tokenizer()
    smaller = tiny_base(family, seed=1, vocab_size=VOCAB_SIZE - 5)
    return {
        "stop_strings": {
            "stop_strings": [*string.printable[:94]],
            "tokenizer": tokenizer,
            "max_new_tokens": 9,
        },
        "assistant_model": {"assistant_model": tiny_base(family, seed=1)},
        "assistant_tokenizer": {
            "assistant_model": smaller,
            "tokenizer": tokenizer,
            "assistant_tokenizer": spelling_tokenizer(VOCAB_SIZE - 5),
            "decoder_input_ids": torch.tensor([[START, 10, 11, 12]]),  # what both spell
            "max_new_tokens": 6,
        },
        "logits_processor": {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(9, EOS, "cpu")])},
        "stopping_criteria": {
            "stopping_criteria": StoppingCriteriaList([lambda ids, scores: torch.tensor([ids.shape[1] > 3])])
        },
        "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [7, 8 + row], "num_beams": 2},
        "streamer": {"streamer": Listener()},
        "synced_gpus": {"synced_gpus": False},
        "custom_generate": {"custom_generate": own_loop, "extra": 1, "use_cache": False},
        "prompt_lookup": {"prompt_lookup_num_tokens": 2},
        "the cache": {CACHE: None},
        "returned": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    }


@pytest.mark.parametrize("option", [*options_of("bart")])
@pytest.mark.parametrize("family", ["bart", "t5"])
@torch.no_grad()
def test_generate_takes_what_it_takes_of_the_base(family, option):
    base, given = tiny_base(family), {"max_new_tokens": 6, "do_sample": False} | options_of(family)[option]
    inputs = {name: value[:1] for name, value in tiny_inputs(family).items()}
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base))
    results = [GenerationMixin.generate(base, **inputs, **given), model.generate(**inputs, **given)]
    if option == "returned":
        results = [result.sequences for result in results]
    assert torch.equal(*results)
    if option == "streamer":
        half = len(given["streamer"].heard) // 2
        assert half > 6 and given["streamer"].heard[half - 1] is None
    if option == "stop_strings":
        assert results[0].shape[1] < 10


def test_every_argument_that_generate_names_is_tried():
    """A new one of the installed Transformers shows here."""
    names = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
    tried = {name for given in options_of("bart").values() for name in given} | {"generation_config"}
    negative = {"negative_prompt_ids", "negative_prompt_attention_mask"}  # of guidance, for decoders alone
    assert names - negative <= tried


# --------------------------------------------------------------------------------------------------- rows and masks
@over_families
@torch.no_grad()
def test_rows_beside_latents_of_another_number_are_refused(family):
    model, inputs = wrap(family), tiny_inputs(family, batch=6)
    latents = model.encode(**tiny_inputs(family))
    name = next(name for name in inputs if name != "attention_mask")
    for given in (latents, model._packed_encoder_outputs(latents)):
        with pytest.raises(ValueError, match=re.escape(f"There are 3 latents but 6 examples of {name}")):
            model.generate(**{name: inputs[name]}, encoder_outputs=given, max_new_tokens=2)
        with pytest.raises(ValueError, match=re.escape("There are 3 latents but 6 examples of inputs")):
            model.generate(inputs[name], encoder_outputs=given, max_new_tokens=2)
    assert len(model.generate(encoder_outputs=latents, max_new_tokens=2)) == 3


@pytest.mark.parametrize("family", ["bart", "t5", "bert2gpt2", "whisper", "vit2gpt2"])
@torch.no_grad()
def test_no_latents_at_all_are_refused(family):
    model = wrap(family)
    nothing = model.encode(**tiny_inputs(family))[[]]
    with pytest.raises(ValueError, match="hold no latents, so there is nothing to decode"):
        model.generate(encoder_outputs=nothing, max_new_tokens=2)
    assert len(nothing.compact()) == 0


@over_families
@torch.no_grad()
def test_a_mask_that_does_not_belong_to_the_states_is_refused(family):
    """It would be left out, and the padding read."""
    model, inputs = wrap(family), tiny_inputs(family)
    states = model(**inputs, labels=tiny_labels(family)).encoder_last_hidden_state
    length = states.shape[1]
    for shape in ((3, length - 1), (1, length), (3, length, 1)):
        given = {"encoder_last_hidden_state": states, "attention_mask": torch.ones(shape, dtype=torch.long)}
        message = re.escape(f"attention_mask has shape {shape}, but encoder_last_hidden_state")
        for call in (model.encode, model.generate, lambda **x: model(**x, labels=tiny_labels(family))):
            with pytest.raises(ValueError, match=message):
                call(**given)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, 2:] = 0
    masked = model.encode(encoder_last_hidden_state=states, attention_mask=mask)
    assert masked.attention_mask[1].sum() == 3


# -------------------------------------------------------------------------------------------------------- no graph
@over_families
def test_latents_of_evaluation_keep_no_graph(family):
    model, inputs = wrap(family), tiny_inputs(family)
    latents = model.encode(**inputs)
    assert not any(value.requires_grad for value in latents.values())
    assert not latents.pooled().requires_grad
    assert model.train().encode(**inputs).z.requires_grad


def test_an_input_that_requires_gradients_has_them():
    model = tiny_nvib()
    embeds = torch.randn(2, 5, 32, requires_grad=True)
    model.encode(inputs_embeds=embeds).pooled().sum().backward()
    assert embeds.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------- adapters
@WITH_PEFT
@pytest.mark.parametrize("family", ["bart", "t5"])
@torch.no_grad()
def test_an_adapter_for_each_row_and_beams(family):
    """PEFT names one for every beam, so beams do not share the latents of their source there."""
    from peft import LoraConfig, get_peft_model

    names = {"bart": ["q_proj", "k_proj", "v_proj"], "t5": ["q", "k", "v"]}[family]
    config = LoraConfig(target_modules=names, init_lora_weights=False)
    model = get_peft_model(tiny_nvib(family), config, adapter_name="one")
    model.add_adapter("two", config)
    inputs = tiny_inputs(family)
    settings = {"num_beams": 3, "num_return_sequences": 2, **LENGTH}
    adapters = ["one", "two", "__base__"]
    together = model.eval().generate(**inputs, **settings, adapter_names=adapters)
    for row, name in enumerate(adapters):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        expected = model.generate(**alone, **settings, adapter_names=[name])
        assert torch.equal(together[2 * row : 2 * row + 2], expected)
