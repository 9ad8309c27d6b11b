"""An NVIB model as a module of sentence-transformers: the embedding of a text is the mean of its latent.

    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(modules=[PooledLatents("my-nvib")])
    embeddings = model.encode(["The first text.", "Another text."])

`my-nvib` is a folder or repository with a saved model and its tokenizer. The embedding is `latents.pooled()`: the
weighted mean of the vectors that the decoder sees. It trains with the losses of sentence-transformers; the KL terms
are not part of these.
"""

from __future__ import annotations

from sentence_transformers.models import InputModule
from transformers import AutoTokenizer

from nvib_hf import NvibForConditionalGeneration


class PooledLatents(InputModule):
    """Texts to the means of their latents."""

    config_keys = ["max_seq_length"]

    def __init__(self, name: str, max_seq_length: int = 512) -> None:
        super().__init__()
        self.model = NvibForConditionalGeneration.from_pretrained(name)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.max_seq_length = max_seq_length

    def preprocess(self, inputs, prompt=None, **kwargs) -> dict:
        texts = self._prepend_prompt(inputs, prompt) if prompt else list(inputs)
        settings = {"padding": True, "truncation": True, "max_length": self.max_seq_length, "return_tensors": "pt"}
        return dict(self.tokenizer(texts, **settings))

    def forward(self, features: dict, **kwargs) -> dict:
        names = ("input_ids", "attention_mask")
        latents = self.model.encode(**{name: features[name] for name in names}, sample=False)
        return {**features, "sentence_embedding": latents.pooled()}

    def get_embedding_dimension(self) -> int:
        return self.model.nvib.size_out

    get_sentence_embedding_dimension = get_embedding_dimension  # its older name

    def save(self, output_path: str, *args, **kwargs) -> None:
        self.model.save_pretrained(output_path)
        self.tokenizer.save_pretrained(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, *args, **kwargs) -> PooledLatents:
        return cls(model_name_or_path)
