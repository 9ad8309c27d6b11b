"""The latent as a memory for ``nn.TransformerDecoder``: a tuple that passes through it untouched."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .denoising_attention import (
    additive_mask,
    at_least_float32,
    attended_means,
    attended_mixture,
    attended_points,
    denoising_attention,
)
from .distributions import LOG_ALPHA_REPORTED_MAX, log_of_positive
from .kl import kl_dirichlet, kl_gaussian
from .nvib import NvibLayer
from .settings import EVALUATIONS, check_boolean, check_choice


class _Fields(NamedTuple):
    z: Tensor
    pi: Tensor
    mu: Tensor
    logvar: Tensor


class NvibMemory(_Fields):
    """A tuple ``(z, pi, mu, logvar)`` with an attribute ``log_pi``, so that nothing computes ``log(pi)``.

    ``z``, ``mu``, ``logvar`` are ``(Nl, B, P)``; ``pi``, ``log_pi`` are ``(Nl, B, 1)``. With ``batch_first`` they are
    ``(B, Nl, ...)``. You can leave out the weights' last dimension. Training attends to ``z`` with weights ``pi``,
    evaluation to the mixture of Gaussians ``mu``, ``logvar``, ``pi``. ``pi = 0`` (``log_pi = -inf``) masks a vector.
    The attribute ``points`` says that every variance is 0; then evaluation attends to ``z`` too.

    It is a tuple of four because published code unpacks four values, and ``nn.TransformerDecoder`` passes a tuple
    through. A NamedTuple's own ``__new__`` and ``_replace`` would not set the attributes.

    Raises:
        ValueError: ``pi`` or ``log_pi`` does not have one weight for each vector of ``z``.
    """

    log_pi: Tensor
    points: bool

    def __new__(
        cls,
        z: Tensor,
        pi: Tensor,
        mu: Tensor,
        logvar: Tensor,
        log_pi: Tensor | None = None,
        points: bool = False,
    ) -> NvibMemory:
        pi = _column("pi", pi, z)
        if log_pi is None:
            log_pi = log_of_positive(at_least_float32(pi))
        memory = super().__new__(cls, z, pi, mu, logvar)
        memory.log_pi, memory.points = _column("log_pi", log_pi, z), points
        return memory

    def _replace(self, **fields: Any) -> NvibMemory:
        """As in any NamedTuple. A new ``pi`` replaces ``log_pi`` too; a new ``mu`` or ``logvar`` resets ``points``."""
        kept: dict[str, Any] = {} if "pi" in fields else {"log_pi": self.log_pi}
        if not fields.keys() & {"mu", "logvar"}:
            kept["points"] = self.points
        return type(self)(**self._asdict() | kept | fields)


def _column(name: str, weights: Tensor, z: Tensor) -> Tensor:
    """Weights with a last dimension of 1. It is added if a dimension is missing, whatever the sizes are."""
    column = weights[..., None] if weights.dim() == z.dim() - 1 else weights
    if column.shape != (*z.shape[:-1], 1):
        raise ValueError(
            f"{name} has shape {tuple(weights.shape)}, but z has {tuple(z.shape)}. Pass one weight for each vector, "
            f"{(*z.shape[:-1], 1)}; the last dimension is optional."
        )
    return column


def as_memory(memory: object) -> NvibMemory:
    """``memory`` itself, or an :class:`NvibMemory` made from a plain tuple ``(z, pi, mu, logvar)``.

    Raises:
        TypeError: it is something else. ValueError: ``pi`` does not fit ``z``.
    """
    if isinstance(memory, NvibMemory):
        return memory
    if isinstance(memory, tuple) and len(memory) == 4 and all(isinstance(x, torch.Tensor) for x in memory):
        return NvibMemory(*memory)
    raise TypeError(
        f"Denoising attention needs a memory (z, pi, mu, logvar), but got {type(memory).__name__}. Pass the "
        "'z' entry of an Nvib layer's output, or Nvib.sample(...)."
    )


class LayerSettings(TypedDict, total=False):
    """The settings that :class:`Nvib` passes on to :class:`~nvib_hf.layers.nvib.NvibLayer`."""

    alpha_activation: str
    dropping: str
    alpha_threshold: float
    dropping_share: float
    kl_weights: str
    scale: float | None


class PublishedLatent(TypedDict):
    """What :class:`Nvib` returns; see its ``forward``."""

    z: NvibMemory
    pi: Tensor
    mu: Tensor
    logvar: Tensor
    alpha: Tensor
    log_alpha: Tensor
    memory_key_padding_mask: Tensor
    keep: Tensor
    batch_first: bool
    avg_num_vec: Tensor
    avg_prop_vec: Tensor
    avg_effective_num_vec: Tensor
    avg_alpha0: Tensor


class Nvib(NvibLayer):
    r"""Nonparametric variational information bottleneck: :class:`~nvib_hf.layers.nvib.NvibLayer`, for plain PyTorch.

    Args:
        size_in, size_out, prior_mu, prior_var, prior_alpha, delta, kappa: see :class:`~nvib_hf.layers.nvib.NvibLayer`.
        batch_first: ``(B, Ns, H)`` instead of ``(Ns, B, H)``, inputs and outputs.
        settings: its other settings: ``alpha_activation``, ``dropping``, ``alpha_threshold``, ``dropping_share``,
            ``kl_weights``, ``scale``.

    Raises:
        ValueError: for an argument outside its range.

    Example:
        >>> layer = Nvib(16, 16, prior_mu=0, prior_var=1, prior_alpha=1, delta=1, kappa=1)
        >>> latent = layer(torch.randn(5, 2, 16), torch.zeros(2, 5, dtype=torch.bool))
        >>> latent["z"].z.shape
        torch.Size([6, 2, 16])
        >>> layer.kl_gaussian(**latent).shape
        torch.Size([2])

    Source: Henderson & Fehr (ICLR 2023), section 3.1; the quadratic term: Fehr & Henderson (COLM 2024).
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        prior_mu: float | Tensor = 0.0,
        prior_var: float | Tensor = 1.0,
        prior_alpha: float = 1.0,
        delta: float = 1.0,
        kappa: int = 1,
        *,
        batch_first: bool = False,
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(size_in, size_out, prior_mu, prior_var, prior_alpha, delta, kappa, **settings)
        self.batch_first = batch_first

    def forward(  # type: ignore[override]  # the published interface differs from the layer's
        self,
        encoder_output: Tensor,
        src_key_padding_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PublishedLatent:
        """Encoder output to latent.

        Args:
            encoder_output: ``(Ns, B, H)``; ``(B, Ns, H)`` if ``batch_first``.
            src_key_padding_mask: ``(B, Ns)``, boolean, True = padding.
            generator: for the draws of training.

        Returns:
            A dict with ``z``: the :class:`~nvib_hf.layers.published.NvibMemory` that a decoder takes as memory;
            ``pi``, ``alpha``, ``log_alpha`` ``(Nl, B, 1)``; ``mu``, ``logvar`` ``(Nl, B, P)`` (``(B, Nl, ...)`` if
            ``batch_first``); ``memory_key_padding_mask`` ``(B, Nl)``, True = padding; ``keep`` ``(B, Nl)``, True =
            neither padding nor dropped; ``batch_first``; and means over the batch: ``avg_num_vec`` (kept vectors
            without the prior's), ``avg_prop_vec`` (their share of the source length), ``avg_effective_num_vec``
            (``exp(entropy(pi))``) and ``avg_alpha0``. In training ``Nl = kappa * (Ns + 1)``, and each vector has
            ``alpha_i / kappa``. In evaluation ``Nl = Ns + 1``.
        """
        check_boolean("src_key_padding_mask", src_key_padding_mask)
        hidden_states = self._order(encoder_output)
        output = super().forward(hidden_states, src_key_padding_mask, generator=generator, with_kl=False)
        drawn, order = output.drawn, self._order
        mu, logvar, log_alpha = order(drawn.mu), order(drawn.logvar), order(drawn.log_alpha)[..., None]
        memory = NvibMemory(order(output.z), order(output.log_pi.exp()), mu, logvar, log_pi=order(output.log_pi))
        padding = order(~drawn.mask)[..., None]
        alpha = log_alpha.clamp(max=LOG_ALPHA_REPORTED_MAX).exp()
        statistics = output.posterior.statistics()
        return {
            "z": memory,
            "pi": memory.pi,
            "mu": mu,
            "logvar": logvar,
            "alpha": alpha.masked_fill(padding | (log_alpha <= self._log_zero), 0),
            "log_alpha": log_alpha.masked_fill(padding, float("-inf")),
            "memory_key_padding_mask": ~drawn.mask,
            "keep": drawn.keep,
            "batch_first": self.batch_first,
            "avg_num_vec": statistics["num_vec"].mean(),
            "avg_prop_vec": statistics["prop_vec"].mean(),
            "avg_effective_num_vec": statistics["effective_num_vec"].mean(),
            "avg_alpha0": statistics["alpha0"].mean(),
        }

    def sample(
        self,
        number_samples: int,
        memory_key_padding_mask: Tensor,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> NvibMemory:
        """Draw a memory from the prior, with its weights. A decoder reads it alike in ``train()`` and ``eval()``.

        Args:
            number_samples: batch size ``B``.
            memory_key_padding_mask: ``(B, Ns)``, boolean, True = padding. Exactly ``Ns`` vectors are drawn. Each
                sample needs at least one vector that is not padding.
            device: the result's device; by default the layer's.
            generator: for the draws, on the layer's device.

        Returns:
            ``z`` and ``mu`` ``(Ns, B, P)``, which are the same tensor, ``logvar`` of ``-inf``, ``pi`` ``(Ns, B, 1)``;
            ``(B, Ns, ...)`` if ``batch_first``.

        Raises:
            ValueError: the mask's batch is not ``number_samples``, or a sample has no vector.
        """
        check_boolean("memory_key_padding_mask", memory_key_padding_mask)
        check_rows_of_prior(memory_key_padding_mask, number_samples)
        z, log_pi = self.sample_prior(memory_key_padding_mask.to(self.prior_mu.device), generator)
        z, log_pi = (self._order(x.to(device or x.device)) for x in (z, log_pi))
        logvar = torch.full_like(z, float("-inf"))
        return NvibMemory(z, log_pi.exp(), z, logvar, log_pi=log_pi, points=True)

    def kl_gaussian(self, kappa: int | None = None, **latent: Any) -> Tensor:
        """:func:`~nvib_hf.layers.kl.kl_gaussian` ``(B,)`` with the layer's prior and weights.

        ``kappa``, the vectors per component, is by default the layer's in training and 1 in evaluation.
        """
        prior: dict[str, Any] = {"prior_mu": self.prior_mu, "prior_var": self.prior_logvar.exp()}
        return kl_gaussian(**{"weights": self.kl_weights, **latent}, **prior, kappa=self._repeats(kappa))

    def kl_dirichlet(self, kappa: int | None = None, **latent: Any) -> Tensor:
        """:func:`~nvib_hf.kl_dirichlet` ``(B,)`` with the layer's prior; ``kappa`` as in :meth:`kl_gaussian`."""
        prior: dict[str, Any] = {"prior_log_alpha": self.prior_log_alpha, "delta": self.delta}
        return kl_dirichlet(**latent, **prior, kappa=self._repeats(kappa))

    def _repeats(self, kappa: int | None) -> int:
        return (self.kappa if self.training else 1) if kappa is None else kappa

    def _order(self, x: Tensor) -> Tensor:
        """Change between the interface's layout and the layer's, which is batch-first."""
        return x if self.batch_first else x.transpose(0, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, batch_first={self.batch_first}"


class DenoisingMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose keys and values are a distribution over vectors.

    In ``train()`` it attends to the sample ``z`` with weights ``pi``, in ``eval()`` to the mixture of Gaussians
    ``mu``, ``logvar``, ``pi``, or to its means alone. Parameters, names and initialisation are those of
    ``nn.MultiheadAttention``, so state dicts are interchangeable.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as in
            ``nn.MultiheadAttention``; ``kdim`` (= ``vdim``) is the width ``P`` of the latent vectors.
        evaluation: what ``eval()`` attends to. ``"mixture"``: the mixture, as published. ``"means"``: the points
            ``mu``, with the scores that their samples have on average. This fits training with one vector per
            component.
        exact: for the mixture, keep the query-norm term of the evaluation score (see
            :func:`~nvib_hf.layers.denoising_attention.denoising_attention`).

    Raises:
        ValueError: ``add_bias_kv`` or ``add_zero_attn`` is set; ``kdim`` and ``vdim`` differ; ``evaluation`` is
            unknown.

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
                    f"{name}=True is refused: it adds a key that is not a vector of the latent, so it has neither "
                    "weight nor variance. Leave it out: the prior's component already has this role."
                )
        if (kdim or embed_dim) != (vdim or embed_dim):
            raise ValueError(
                f"kdim is {kdim or embed_dim} and vdim is {vdim or embed_dim}, but keys and values are projections "
                "of the same latent vectors. Pass the same number, the width of the latent."
            )
        super().__init__(embed_dim, num_heads, dropout, bias, False, False, kdim, vdim, batch_first, device, dtype)
        self.evaluation, self.exact = evaluation, exact

    def forward(  # type: ignore[override]  # nn.TransformerDecoder passes a memory through like a tensor
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
            TypeError: ``key`` is not a memory. ValueError: shapes do not fit; ``value`` is another memory.
        """
        if value is not None and value is not key:
            raise ValueError(
                "value must be the same memory as key, because both are projections of its vectors. Leave it out."
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask, but attn_mask is None. Pass the mask too.")
        memory = as_memory(key)
        if query.dim() != 3:
            raise ValueError(f"query must have 3 dimensions, but has shape {tuple(query.shape)}.")
        z, mu, logvar, log_pi = memory.z, memory.mu, memory.logvar, memory.log_pi.squeeze(-1)
        if not self.batch_first:
            query, z, mu, logvar, log_pi = (x.transpose(0, 1) for x in (query, z, mu, logvar, log_pi))
        if len(z) != len(query):
            raise ValueError(
                f"The memory has a batch of {len(z)}, but the query one of {len(query)}. Pass one latent per example."
            )
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            check_boolean(name, mask, or_additive=True)
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
            split: Tensor = x.unflatten(-1, (heads, width))
            return split.transpose(1, 2)

        output, weights = denoising_attention(
            by_head(F.linear(query, query_weight, query_bias)),
            by_head(F.linear(attended.vectors, key_weight, key_bias)),
            by_head(F.linear(attended.vectors, value_weight, value_bias)),
            attended.bias,
            scale,
            shrinkage=attended.shrinkage,
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
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return output, weights

    def _projections(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Weights and biases of query, key and value. ``nn.MultiheadAttention`` stores them in two ways."""
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


def check_rows_of_prior(padding_mask: Tensor, number_samples: int) -> None:
    """Raise ValueError unless a mask has ``number_samples`` samples, each with at least one vector."""
    if padding_mask.shape[0] != number_samples:
        raise ValueError(
            f"memory_key_padding_mask has a batch of {padding_mask.shape[0]}, but number_samples is {number_samples}. "
            "Pass a mask for each sample."
        )
    if padding_mask.all(-1).any():
        raise ValueError(
            "memory_key_padding_mask has a sample that is all padding. Leave at least one vector in each."
        )
