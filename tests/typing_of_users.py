"""What users write, with the types they may rely on. mypy reads it (``test_typing.py``); nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import nvib_hf
from nvib_hf import (
    AttentionSpec,
    DenoisingMultiheadAttention,
    EmpiricalPrior,
    Nvib,
    NvibConfig,
    NvibForConditionalGeneration,
    NvibForSequenceClassification,
    NvibLatents,
    NvibMemory,
    concatenate_latents,
    decode_latents,
    denoising_attention,
    empirical_prior,
    encode_texts,
    evaluate,
    kl_dirichlet,
    kl_gaussian,
    latent_distance,
    naive_denoising_attention,
    reconstruct,
    register_attention,
)


def models(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
    model = NvibForConditionalGeneration.from_base_pretrained("a-name", lambda_gaussian=0.01)
    assert_type(model, NvibForConditionalGeneration)
    assert_type(model.freeze_base(), NvibForConditionalGeneration)
    assert_type(NvibForSequenceClassification.from_base_pretrained("a-name"), NvibForSequenceClassification)
    assert_type(model.config, NvibConfig)
    assert_type(model.nvib.size_out, int)

    latents = model.encode(tokens, attention_mask=tokens, sample=False)
    assert_type(latents, NvibLatents)
    assert_type(latents.num_vectors, Tensor | None)
    assert_type(model.encode(input_ids=tokens)["num_vectors"], Tensor)
    assert_type(model.sample_latents(num_samples=3, num_vectors=[5, 8, 13]), NvibLatents)
    assert_type(model.interpolate_latents(latents[0], latents[1], weight=torch.linspace(0, 1, 5)), NvibLatents)
    assert_type(model.vary_latents(latents, temperature=0.5), NvibLatents)
    assert_type(model.blend_latents(latents, num_samples=2), NvibLatents)
    model.generate(encoder_outputs=latents, max_new_tokens=8)
    assert_type(encode_texts(model, tokenizer, ["a text"]), NvibLatents)
    assert_type(decode_latents(model, tokenizer, latents), list[str])
    assert_type(reconstruct(model, tokenizer, ["a text"]), list[str])
    evaluate(model, tokenizer, ["a text"])


def latents_as_a_batch(latents: NvibLatents, file: Path) -> None:
    assert_type(latents.z.shape, torch.Size)
    assert_type(latents.log_pi, Tensor)
    assert_type(latents.logvar, Tensor | None)
    assert_type(latents[0], NvibLatents)
    assert_type(latents[2:4], NvibLatents)
    assert_type(latents[[0, 2]], NvibLatents)
    assert_type(latents[torch.tensor([True, False])], NvibLatents)
    assert_type(latents["z"], Tensor)
    assert_type(len(latents), int)
    for latent in latents:
        assert_type(latent, NvibLatents)
    assert_type(dict(latents.items()), dict[str, Tensor])
    latents.save(file)
    assert_type(NvibLatents.load(file, device="cpu").to(torch.float64), NvibLatents)
    assert_type(concatenate_latents([latents, latents]).pooled(), Tensor)
    assert_type(latent_distance(latents, latents), Tensor)


def plain_pytorch(encoded: Tensor, padding: Tensor) -> None:
    layer = Nvib(64, 64, prior_mu=0, prior_var=1, alpha_threshold=0.1, scale=16**-0.5)
    latent = layer.forward(encoded, padding)
    assert_type(latent["z"], NvibMemory)
    assert_type(latent["z"].log_pi, Tensor)
    assert_type(latent["avg_num_vec"], Tensor)
    assert_type(layer.kl_gaussian(**latent) + layer.kl_dirichlet(**latent), Tensor)
    assert_type(layer.sample(3, padding), NvibMemory)
    output, weights = DenoisingMultiheadAttention(64, 4).forward(encoded, latent["z"])
    assert_type(output, Tensor)
    assert_type(weights, Tensor | None)
    prior = empirical_prior([(encoded, None)], scale=0.25)
    assert_type(prior, EmpiricalPrior)
    layer.set_prior(*prior)
    assert_type(kl_gaussian(encoded, encoded, log_alpha=encoded, weights="drawn"), Tensor)
    assert_type(kl_dirichlet(log_alpha=encoded, delta=0.5), Tensor)
    output, _ = denoising_attention(encoded, encoded, encoded, encoded, scale=0.25)
    assert_type(output, Tensor)
    parameters = (encoded, encoded, encoded)
    weight = torch.ones(4, 16, 64)
    assert_type(naive_denoising_attention(encoded, *parameters, weight, weight, 0.25), Tensor)
    register_attention(AttentionSpec(place="cross_attn", output="dense"), "MyAttention")


def mistakes_that_are_found(latents: NvibLatents) -> None:
    print(latents.shape)  # type: ignore[attr-defined]  # that is z's
    print(latents["z", 0])  # type: ignore[index]  # that is latents["z"][0]
    Nvib(64, 64, alpha_treshold=0.1)  # type: ignore[call-arg]  # misspelt
    NvibForConditionalGeneration.from_base_pretrained()  # type: ignore[call-arg]  # of which base?
    print(nvib_hf.NvibLatent)  # type: ignore[attr-defined]  # misspelt, at the top level
