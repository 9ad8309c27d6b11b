"""A small causal transformer, read whole in training and step by step in sampling, and what it samples from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Cache = list[tuple[Tensor, Tensor] | None]


class CausalTransformer(nn.Module):
    """Layers of causal self-attention and a feed-forward network, each behind a norm and beside a residual.

    Padding needs no mask if it stands at the end: nothing before it sees it.

    Args:
        d_model: width; num_heads divides it.
        num_layers: how many.
        dropout: of what each layer adds, and of the attention's weights.
    """

    def __init__(self, d_model: int, num_layers: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CausalLayer(d_model, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        for name, weight in self.named_parameters():  # so that the sum over layers starts as wide as what comes in
            if name.endswith(("attention_out.weight", "feed_forward.2.weight")):
                nn.init.normal_(weight, std=0.02 / (2 * num_layers) ** 0.5)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """States ``(B, n, d_model)`` of ``x``, each of what stands before it and itself.

        Args:
            cache: of :meth:`empty_cache`; ``x`` then continues what was read with it before, and is added to it.
        """
        for i, layer in enumerate(self.layers):
            x = layer(x, cache, i)
        states: Tensor = self.norm(x)
        return states

    def empty_cache(self) -> Cache:
        return [None] * len(self.layers)


class CausalLayer(nn.Module):
    """One layer of :class:`CausalTransformer`."""

    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention_in, self.attention_out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.GELU(approximate="tanh"), nn.Linear(4 * d_model, d_model)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, cache: Cache | None, index: int) -> Tensor:
        x = x + F.dropout(self.attend(self.attention_norm(x), cache, index), self.dropout, self.training)
        return x + F.dropout(self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)

    def attend(self, x: Tensor, cache: Cache | None, index: int) -> Tensor:
        query, key, value = (  # (B, H, n, E) each
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.attention_in(x).chunk(3, -1)
        )
        past = 0
        if cache is not None:
            if (read := cache[index]) is not None:
                past = read[0].shape[2]
                key, value = (torch.cat(pair, dim=2) for pair in zip(read, (key, value), strict=True))
            cache[index] = (key, value)
        n = query.shape[2]
        seen = torch.ones(n, past + n, dtype=torch.bool, device=x.device).tril(past)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropout)
        out: Tensor = self.attention_out(attended.transpose(1, 2).flatten(2))
        return out


def sharpened(log_chances: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities ``(B, K)`` at a temperature, without those beyond the most probable ``top_p``; not normalised."""
    if temperature == 0:
        return F.one_hot(log_chances.argmax(-1), log_chances.shape[-1]).to(log_chances)
    chances = (log_chances / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = chances.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # never the first
        chances = chances.masked_fill(beyond.gather(-1, order.argsort(-1)), 0)
    return chances
