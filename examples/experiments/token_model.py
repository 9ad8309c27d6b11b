"""A language model of tokens with the transformer of the learned prior: the ceiling of what a prior can write."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import text_vae as example
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvib_hf.evaluation.texts import evaluating, length_batches
from nvib_hf.layers.causal_transformer import CausalTransformer, sharpened
from nvib_hf.training.latent_prior_training import optimizer_and_schedule, shuffled_batches


class TokenModel(nn.Module):
    """A language model of token ids.

    Args:
        start, end: the ids before a text and at its end.
    """

    def __init__(
        self, vocabulary: int, d_model: int, start: int, end: int, num_layers: int = 4, max_length: int = 80
    ) -> None:
        super().__init__()
        self.start, self.end = start, end
        self.tokens, self.places = nn.Embedding(vocabulary, d_model), nn.Embedding(max_length, d_model)
        self.transformer = CausalTransformer(d_model, num_layers, 4, 0.1)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: Tensor, cache=None, past: int = 0) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(past, past + ids.shape[1]))
        return self.transformer(F.dropout(x, 0.1, self.training), cache) @ self.tokens.weight.T + self.bias

    def nats(self, rows: Sequence[list[int]]) -> Tensor:
        """The cross-entropy of rows of token ids, each with its end, in nats: their sum."""
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, padding_value=-100)
        before = F.pad(ids[:, :-1].clamp(min=0), (1, 0), value=self.start)
        return F.cross_entropy(self(before).flatten(0, 1), ids.flatten(), reduction="sum")

    def mean_nats(self, rows: Sequence[list[int]], batch_size: int) -> float:
        """The cross-entropy in nats per text, without dropout."""
        with evaluating(self):
            batches = length_batches([len(row) for row in rows], batch_size)
            return sum(self.nats([rows[i] for i in batch]).item() for batch in batches) / len(rows)

    @torch.no_grad()
    def sample(self, num_samples: int, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
        """Token ids ``(B, n)``, filled up with ends."""
        cache, drawn = self.transformer.empty_cache(), []
        token = torch.full((num_samples, 1), self.start)
        ended = torch.zeros(num_samples, 1, dtype=torch.bool)
        while not ended.all() and len(drawn) < example.MAX_LENGTH:
            log_chances = self(token, cache, len(drawn))[:, 0].log_softmax(-1)
            token = torch.multinomial(sharpened(log_chances, temperature, top_p), 1, generator=generator)
            token = token.masked_fill(ended, self.end)
            ended |= token == self.end
            drawn.append(token)
        return torch.cat(drawn, dim=1)


def train_token_model(model: TokenModel, rows: list[list[int]], watched: list[list[int]], settings: dict) -> None:
    """As `fit_latent_prior` trains; the model ends with the weights that were best on the watched texts."""
    steps, batch_size = settings["steps"], settings["batch_size"]
    optimizer, schedule = optimizer_and_schedule(model, steps)
    generator, waiting, best, weights = torch.Generator().manual_seed(settings["seed"]), [], float("inf"), None
    for step in range(1, steps + 1):
        waiting = waiting or list(shuffled_batches([len(row) for row in rows], batch_size, generator))
        batch = [rows[i] for i in waiting.pop()]
        model.train()
        optimizer.zero_grad()
        (model.nats(batch) / sum(map(len, batch))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps:
            loss = model.mean_nats(watched, batch_size)
            if loss < best:
                best, weights = loss, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    model.eval()
