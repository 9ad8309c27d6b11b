"""``examples/sentence_embeddings.py``: embeddings are the means of latents, and training moves them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_nvib import tiny_nvib
from tiny_text import tiny_tokenizer

sentence_transformers = pytest.importorskip("sentence_transformers")
TEXTS = ["w3 w5 w8", "w7", "w9 w9"]


@pytest.fixture
def pooled_latents(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    yield __import__("sentence_embeddings").PooledLatents
    sys.modules.pop("sentence_embeddings", None)


def test_embeddings_are_the_means_of_latents(pooled_latents, tmp_path):
    model, tokenizer = tiny_nvib(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "nvib")
    tokenizer.save_pretrained(tmp_path / "nvib")
    embedder = sentence_transformers.SentenceTransformer(
        modules=[pooled_latents(str(tmp_path / "nvib"))], device="cpu"
    )
    found = embedder.encode(TEXTS)
    with torch.no_grad():
        for text, embedding in zip(TEXTS, found, strict=True):  # each by itself: padding is not seen
            inputs = tokenizer([text], return_tensors="pt")
            expected = model.encode(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooled()
            np.testing.assert_allclose(embedding, expected[0].numpy(), atol=1e-4)
    assert embedder.similarity(found, found).shape == (3, 3)
    embedder.save(str(tmp_path / "embedder"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "embedder"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(again.encode(TEXTS), found, atol=1e-5)
    embedder.train()
    features = embedder.preprocess(TEXTS)
    embedder(features)["sentence_embedding"].square().sum().backward()
    assert all(layer.mu_logvar.weight.grad.abs().max() > 0 for layer in embedder[0].model.nvib_layers().values())
