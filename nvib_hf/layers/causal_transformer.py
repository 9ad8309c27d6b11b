"""A small causal transformer, read whole in training and step by step in sampling."""

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
        for layer in self.layers:  # so that the sum over the layers starts as wide as what comes in
            for projection in (layer.attention_out, layer.feed_forward[2]):
                nn.init.normal_(projection.weight, std=0.02 / (2 * num_layers) ** 0.5)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """States ``(B, n, d_model)`` of ``x``, each of what stands before it and itself.

        Args:
            cache: of :meth:`empty_cache`; ``x`` then continues what was read with it before, and is added to it.
        """
        for i, layer in enumerate(self.layers):
            x = layer(x, cache, i)
        return self.norm(x)

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
        for projection in (self.attention_in, self.attention_out, self.feed_forward[0], self.feed_forward[2]):
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor, cache: Cache | None, index: int) -> Tensor:
        x = x + F.dropout(self.attend(self.attention_norm(x), cache, index), self.dropout, self.training)
        return x + F.dropout(self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)

    def attend(self, x: Tensor, cache: Cache | None, index: int) -> Tensor:
        query, key, value = (  # (B, H, n, E) each
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.attention_in(x).chunk(3, -1)
        )
        past = 0
        if cache is not None:
            if cache[index] is not None:
                past = cache[index][0].shape[2]
                key, value = (torch.cat(pair, dim=2) for pair in zip(cache[index], (key, value), strict=True))
            cache[index] = (key, value)
        n = query.shape[2]
        seen = torch.ones(n, past + n, dtype=torch.bool, device=x.device).tril(past)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropout)
        return self.attention_out(attended.transpose(1, 2).flatten(2))
