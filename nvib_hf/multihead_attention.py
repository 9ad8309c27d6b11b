r"""Denoising attention as a drop-in for ``nn.TransformerDecoderLayer.multihead_attn``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .denoising_attention import additive_mask, attended_means, attended_mixture, attended_points, denoising_attention
from .memory import NvibMemory, as_memory
from .validation import EVALUATIONS, check_choice


class DenoisingMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose keys and values are a distribution over vectors.

    In ``train()`` it attends to the sample ``z`` with weights ``pi``, in ``eval()`` to the mixture of Gaussians
    ``mu``, ``logvar``, ``pi``, or to its means alone. Parameters, names and initialisation are those of
    ``nn.MultiheadAttention``, so state dicts are interchangeable.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as in
            ``nn.MultiheadAttention``; ``kdim`` (= ``vdim``) is the width ``P`` of the latent vectors.
        evaluation: what ``eval()`` attends to: ``"mixture"``, as published, or ``"means"``, the points ``mu``,
            scored as their samples are on average, which is what training with one vector per component fits.
        exact: of the mixture, keep the query-norm term of the evaluation score (see
            :func:`~nvib_hf.denoising_attention.denoising_attention`).

    Raises:
        ValueError: ``add_bias_kv``, ``add_zero_attn``, ``kdim`` and ``vdim`` that differ, or an ``evaluation`` that
            is neither of the two.

    Example:
        >>> layer = nn.TransformerDecoderLayer(16, nhead=4)
        >>> layer.multihead_attn = DenoisingMultiheadAttention(16, 4)
        >>> memory = Nvib(16, 16)(torch.randn(5, 2, 16))["z"]
        >>> layer(torch.randn(3, 2, 16), memory).shape
        torch.Size([3, 2, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        evaluation: str = "mixture",
        exact: bool = False,
    ) -> None:
        check_choice("evaluation", evaluation, EVALUATIONS)
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ValueError(
                    f"{name}=True is refused: it adds a key that is no vector of the latent, so it has neither "
                    "weight nor variance. The prior's component already plays its part."
                )
        if (kdim or embed_dim) != (vdim or embed_dim):
            raise ValueError(
                f"kdim is {kdim or embed_dim} and vdim is {vdim or embed_dim}, but keys and values are projections "
                "of the same latent vectors. Pass the same number, the width of the latent."
            )
        super().__init__(embed_dim, num_heads, dropout, bias, False, False, kdim, vdim, batch_first, device, dtype)
        self.evaluation, self.exact = evaluation, exact

    def forward(
        self,
        query: Tensor,
        key: NvibMemory | tuple[Tensor, Tensor, Tensor, Tensor],
        value: NvibMemory | tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in ``nn.MultiheadAttention``, with a memory ``(z, pi, mu, logvar)`` for ``key``.

        Args:
            query: ``(Nt, B, embed_dim)``; ``(B, Nt, embed_dim)`` if ``batch_first``.
            key: the memory; its ``pi`` is 0 where a vector is masked.
            value: the same memory, or ``None``.
            key_padding_mask: ``(B, Nl)``, True = padding (boolean), or additive.
            attn_mask: ``(Nt, Nl)`` or ``(B * H, Nt, Nl)``, True = not allowed (boolean), or additive.
            is_causal: a hint that ``attn_mask`` is causal; needs ``attn_mask``.

        Returns:
            The output, shaped as ``query``, and the weights ``(B, Nt, Nl)`` (``(B, H, Nt, Nl)`` unless averaged).

        Raises:
            TypeError: ``key`` is no memory. ValueError: shapes do not fit; ``value`` is another memory.
        """
        if value is not None and value is not key:
            raise ValueError("value must be the same memory as key: both are projections of its vectors.")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask, but attn_mask is None. Pass the mask too.")
        memory = as_memory(key)
        if query.dim() != 3:
            raise ValueError(f"query must have 3 dimensions, but has shape {tuple(query.shape)}.")
        z, mu, logvar, log_pi = memory.z, memory.mu, memory.logvar, memory.log_pi.squeeze(-1)
        dropped = memory.dropped if self.training else None
        if dropped is not None:
            log_pi = memory.full_log_pi
        if not self.batch_first:
            query, z, mu, logvar, log_pi = (x.transpose(0, 1) for x in (query, z, mu, logvar, log_pi))
            dropped = None if dropped is None else dropped.transpose(0, 1)
        if key_padding_mask is not None:
            padding = key_padding_mask
            log_pi = log_pi + additive_mask(~padding if padding.dtype == torch.bool else padding, log_pi.dtype)

        heads, width, scale = self.num_heads, self.head_dim, self.head_dim**-0.5
        if self.training or memory.points:
            attended = attended_points(z, log_pi, scale)
        else:
            of_posterior = attended_means if self.evaluation == "means" else attended_mixture
            attended = of_posterior(mu, logvar, log_pi, scale)
        (query_weight, key_weight, value_weight), (query_bias, key_bias, value_bias) = self._projections()

        def by_head(x: Tensor) -> Tensor:  # (B, N, H * E) -> (B, H, N, E)
            return x.unflatten(-1, (heads, width)).transpose(1, 2)

        output, weights = denoising_attention(
            by_head(F.linear(query, query_weight, query_bias)),
            by_head(F.linear(attended.vectors, key_weight, key_bias)),
            by_head(F.linear(attended.vectors, value_weight, value_bias)),
            attended.bias,
            scale,
            shrinkage=attended.shrinkage,
            dropped=dropped,
            key_weight=key_weight.unflatten(0, (heads, width)),
            value_weight=value_weight.unflatten(0, (heads, width)),
            exact=self.exact,
            attention_mask=self._attention_mask(attn_mask, query.shape[0], query.dtype),
            dropout_p=self.dropout if self.training else 0.0,
            need_weights=need_weights,
        )
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        if need_weights and average_attn_weights:
            weights = weights.mean(1)
        return output, weights

    def _projections(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Weights and biases of query, key and value, however ``nn.MultiheadAttention`` stores them."""
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return weights, biases

    def _attention_mask(self, mask: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
        if mask is None:
            return None
        mask = additive_mask(~mask if mask.dtype == torch.bool else mask, dtype)
        return mask.view(batch, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask
