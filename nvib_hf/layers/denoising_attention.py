r"""Denoising attention: attention to a mixture of Gaussians instead of a set of vectors.

A query, projected into the latent space (:math:`u = W_k^\top q`), is taken for a noisy observation with
variance ``1 / s`` of a vector drawn from the mixture; attention returns the posterior mean of that vector.

* :func:`attended_points`, :func:`attended_means` and :func:`attended_mixture` turn a latent into what attention reads
  of it: vectors to project to keys and values, a bias for each of them, and (for the mixture) how far each channel is
  shrunk;
* :func:`denoising_attention` is the one attention core, on projected queries, keys and values;
* :func:`naive_denoising_attention` is the definition, slow and obvious, that the tests hold the core to.

Source: Henderson & Fehr (ICLR 2023), section 3.2; Fehr & Henderson (COLM 2024), appendix.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

HALF_PRECISION = (torch.float16, torch.bfloat16)
# The lowest bias a fused kernel is given for a masked vector: exp of it is 0, yet 0 times it is not NaN.
MASKED_BIAS = -1e30


class AttendedLatent(NamedTuple):
    """What denoising attention reads of a latent, the same for all layers and heads.

    ``vectors`` ``(B, Nl, P)`` are projected to keys and values; ``bias`` ``(B, Nl)`` is added to every score,
    ``-inf`` where a vector is masked; ``shrinkage`` ``(B, Nl, P)`` in [0, 1) is ``None`` where all are 0.
    """

    vectors: Tensor
    bias: Tensor
    shrinkage: Tensor | None = None


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` itself in fp32 and fp64, its fp32 copy in half precision."""
    return x.float() if x.dtype in HALF_PRECISION else x


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which products have the precision of their factors, whatever ``torch.autocast`` is around it."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def attended_points(z: Tensor, log_pi: Tensor, scale: float) -> AttendedLatent:
    r"""Training: points with weights, for instance sampled vectors with sampled weights.

    .. math:: b_j = \log \pi_j - \tfrac{s}{2} \lVert z_j \rVert^2

    Args:
        z: vectors before any projection, ``(B, Nl, P)``.
        log_pi: log mixture weights, ``(B, Nl)``; ``-inf`` where a vector is masked.
        scale: the attention's scale ``s``; ``1 / s`` is the variance of the query noise.

    Source: Henderson & Fehr (ICLR 2023), training-time denoising attention.
    """
    squared_norm = torch.linalg.vector_norm(at_least_float32(z), dim=-1).square()
    return AttendedLatent(z, at_least_float32(log_pi) - 0.5 * scale * squared_norm)


def attended_means(mu: Tensor, logvar: Tensor, log_pi: Tensor, scale: float) -> AttendedLatent:
    r"""Evaluation by the means: the training form at the means, with the score that a sample has on average.

    .. math::
        b_j = \log \pi_j - \tfrac{s}{2} \Bigl(\lVert \mu_j \rVert^2 + \sum \sigma_j^2\Bigr)
            = \log \pi_j - \tfrac{s}{2} \, \mathbb{E} \lVert z_j \rVert^2

    Without the variance the prior's component, a point of norm 0, would be preferred to what training showed of it.

    Args:
        mu, logvar: means and log-variances, ``(B, Nl, P)``; ``-inf`` is a variance of 0.
        log_pi: log mixture weights, the expected ones, ``(B, Nl)``; ``-inf`` where a vector is masked.
        scale: the attention's scale ``s``.

    Source: this project; what training with one vector per component fits.
    """
    variance = at_least_float32(logvar).exp().sum(-1)
    return attended_points(mu, log_pi - 0.5 * scale * variance, scale)


def attended_mixture(mu: Tensor, logvar: Tensor, log_pi: Tensor, scale: float) -> AttendedLatent:
    r"""Evaluation by the mixture: the posterior itself, a mixture of Gaussians.

    .. math:: r_j = \frac{s \sigma_j^2}{1 + s \sigma_j^2}, \qquad
        b_j = \log \pi_j - \tfrac{s}{2} \sum (1 - r_j) \mu_j^2 - \tfrac12 \sum \log(1 + s \sigma_j^2)

    and the vectors are the shrunken means :math:`(1 - r_j) \mu_j`.

    Args:
        mu, logvar: means and log-variances, ``(B, Nl, P)``; ``-inf`` is a variance of 0.
        log_pi: log mixture weights, ``(B, Nl)``; ``-inf`` where a vector is masked.
        scale: the attention's scale ``s``.

    Source: Henderson & Fehr (ICLR 2023), test-time denoising attention, with ``1 / s`` for ``sqrt(d)``.
    """
    mean = at_least_float32(mu)
    log_ratio = at_least_float32(logvar) + math.log(scale)  # log(s sigma^2): r is its sigmoid
    shrunken = torch.sigmoid(-log_ratio) * mean
    log_normaliser = -F.logsigmoid(-log_ratio)  # log(1 + s sigma^2)
    bias = at_least_float32(log_pi) - 0.5 * (scale * shrunken * mean + log_normaliser).sum(-1)
    return AttendedLatent(shrunken.to(mu.dtype), bias, torch.sigmoid(log_ratio).to(mu.dtype))


def denoising_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    *,
    shrinkage: Tensor | None = None,
    key_weight: Tensor | None = None,
    value_weight: Tensor | None = None,
    exact: bool = False,
    softcap: float | None = None,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Attention with a bias per key, and the mixture's share of the query in the output.

    .. math::
        a = \operatorname{softmax}_j(s\, q^\top k_j + b_j \,[+ \tfrac{s}{2} (u \odot u)^\top r_j]), \qquad
        o = \sum_j a_j v_j + W_v \Bigl(u \odot \sum_j a_j r_j\Bigr), \qquad u = W_k^\top q

    Args:
        query: ``(B, H, Nt, E)``.
        key, value: projections of the memory's vectors, ``(B, Hk, Nl, E)``; ``Hk`` divides ``H``. Or those of
            :func:`append_bias`, where the same ones are read many times.
        bias: ``(B, Nl)``, in fp32 or better; ``-inf`` where masked, at least one per row is not. ``None`` where it is
            in the keys, by :func:`append_bias`.
        scale: the attention's scale ``s``.
        shrinkage: ``r``, ``(B, Nl, P)``; ``None`` where every variance is 0.
        key_weight, value_weight: ``W_k`` and ``W_v``, ``(Hk, E, P)``; needed with ``shrinkage``.
        exact: keep the term of the query's norm, as exact Bayes has it; the published score leaves it out.
        softcap: the score ``s q.k`` alone passes through ``softcap * tanh(. / softcap)``.
        attention_mask: added to the scores (or, if boolean, False masks), broadcastable to ``(B, H, Nt, Nl)``.
        dropout_p: dropout of the attention weights.
        need_weights: return the weights ``(B, H, Nt, Nl)`` as well.

    Returns:
        ``(B, H, Nt, E)`` and the weights or ``None``.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        if shrinkage is not None:
            weights_of_heads = (_given(key_weight), _given(value_weight))
            key_weight, value_weight = (w.repeat_interleave(groups, dim=0) for w in weights_of_heads)
    if shrinkage is None and softcap is None and not need_weights:
        output, weights = _fused(query, key, value, bias, scale, attention_mask, dropout_p), None
    else:
        if bias is None:
            bias = appended_bias(key, query.shape[-1], scale)
        key, value = key[..., : query.shape[-1]], value[..., : query.shape[-1]]
        scores = _scores(query, key, bias, scale, softcap, attention_mask)
        if shrinkage is not None:
            latent_query = _per_head(query, _given(key_weight))  # u, (B, H, Nt, P)
            if exact:
                norm_term = latent_query.square().flatten(1, 2) @ shrinkage.transpose(-1, -2)  # (B, H * Nt, Nl)
                scores = scores + 0.5 * scale * norm_term.view_as(scores)
        weights = scores.softmax(-1).to(value.dtype)
        counted = F.dropout(weights, dropout_p) if dropout_p > 0 else weights
        output = counted @ value
        if shrinkage is not None:
            mean_shrinkage = (counted.flatten(1, 2) @ shrinkage).view_as(latent_query)
            output = output + _per_head(latent_query * mean_shrinkage, _given(value_weight).transpose(-1, -2))
    return output, weights if need_weights else None


def _given(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise ValueError("shrinkage needs key_weight and value_weight, but one of them is None. Pass both.")
    return weight


def _scores(
    query: Tensor, key: Tensor, bias: Tensor, scale: float, softcap: float | None, attention_mask: Tensor | None
) -> Tensor:
    """Scores ``(B, H, Nt, Nl)`` in fp32 or better, without the query-norm term."""
    scores = at_least_float32(torch.matmul(query * scale, key.transpose(-1, -2)))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias[:, None, None, :].to(scores.dtype)
    return scores if attention_mask is None else scores + additive_mask(attention_mask, scores.dtype)


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """``x[:, h] @ weight[h]`` for every head: ``(B, H, Nt, I)`` and ``(H, I, O)`` to ``(B, H, Nt, O)``."""
    batch, heads, length, width = x.shape
    by_head = x.transpose(0, 1).reshape(heads, batch * length, width)
    return torch.bmm(by_head, weight).view(heads, batch, length, weight.shape[-1]).transpose(0, 1)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is boolean (False masks) or additive, as an additive one."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
    return mask.to(dtype)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    attention_mask: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """Softmax attention with a bias per key through ``scaled_dot_product_attention``.

    The one place where a kernel is chosen. A bias that needs a gradient travels as appended channels, so that no
    mask is left and every fused kernel applies (flash, memory-efficient and cuDNN take head widths that are
    multiples of 8, equal for key and value). Half precision takes this way too: a half-precision mask would round
    the bias, three channels do not. Otherwise the bias is a plain mask: nothing is copied at a decoding step.
    """
    width = query.shape[-1]
    if bias is None or query.dtype in HALF_PRECISION or (torch.is_grad_enabled() and bias.requires_grad):
        if key.shape[-1] == query.shape[-1]:
            assert bias is not None, "neither a bias nor keys that hold one"
            key, value = append_bias(key, value, bias, scale)
        query = F.pad(query, (0, key.shape[-1] - query.shape[-1]), value=1.0)
    else:
        bias = bias[:, None, None, :].to(query.dtype)
        attention_mask = bias if attention_mask is None else bias + additive_mask(attention_mask, bias.dtype)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout_p, scale=scale
    )
    return output[..., :width]


def append_bias(key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``k' = [k, b / s, 0..]`` and ``v' = [v, 0..]``: the scores of ``q' = [q, 1..]`` and ``k'`` contain the bias.

    In half precision the bias takes three channels (:func:`three_summands`). Widths are multiples of 8.
    """
    bias = bias / scale
    channels = three_summands(bias) if key.dtype in HALF_PRECISION else bias[..., None]
    channels = channels.clamp(min=max(MASKED_BIAS, torch.finfo(key.dtype).min)).to(key.dtype)
    batch, heads, length, width = key.shape
    extra = (width + channels.shape[-1] + 7) // 8 * 8 - width
    channels = F.pad(channels, (0, extra - channels.shape[-1]))[:, None].expand(batch, heads, length, -1)
    return torch.cat([key, channels], dim=-1), F.pad(value, (0, extra))


def appended_bias(key: Tensor, width: int, scale: float) -> Tensor:
    """The bias ``(B, Nl)`` of what :func:`append_bias` made of keys of ``width``, but for what was shifted."""
    channels = key[:, 0, :, width : width + (3 if key.dtype in HALF_PRECISION else 1)]
    return at_least_float32(channels).sum(-1) * scale


def three_summands(bias: Tensor, shift: bool = True) -> Tensor:
    """A bias as three summands, ``(..., Nl)`` to ``(..., Nl, 3)``, that a cast to half precision does not round.

    The sum of the three is the bias, to 24 bits after a cast to bf16 and exactly without one.

    Args:
        shift: move the highest of each row to 0 first, which a softmax does not see and which keeps fp16 in range;
            not possible where a row is not known as a whole.
    """
    if shift:
        bias = bias - bias.amax(-1, keepdim=True).detach()
    finite = bias.masked_fill(bias == float("-inf"), 0)
    high = finite.to(torch.bfloat16).to(bias.dtype)
    middle = (finite - high).to(torch.bfloat16).to(bias.dtype)
    high_or_masked = torch.where(bias == float("-inf"), bias, high)
    return torch.stack([high_or_masked, middle, finite - high - middle], dim=-1)


def naive_denoising_attention(
    query: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_pi: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    scale: float,
    *,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    exact: bool = False,
    softcap: float | None = None,
) -> Tensor:
    r"""Denoising attention as it is defined: the reference for :func:`denoising_attention`.

    .. math::
        a_j \propto \pi_j \, \mathcal N(u; \mu_j, \sigma_j^2 + 1/s), \qquad
        o = W_v \sum_j a_j \frac{\sigma_j^2 u + \mu_j / s}{\sigma_j^2 + 1/s} + b_v

    With ``logvar = -inf`` this is the training form for the sample ``z = mu``. Unless ``exact``, the terms of the
    density in ``u * u`` are left out, as published. A key bias matters only under a soft cap.

    Args:
        query: ``(B, H, Nt, E)``; mu, logvar: ``(B, Nl, P)``; log_pi: ``(B, Nl)``.
        key_weight, value_weight: ``(H, E, P)``; key_bias, value_bias: ``(H, E)``.

    Returns:
        ``(B, H, Nt, E)``. Memory is ``B * H * Nt * Nl * P``: for tests.
    """
    u = torch.einsum("bhte,hep->bhtp", query, key_weight)[:, :, :, None]  # (B, H, Nt, 1, P)
    mean, variance = mu[:, None, None], logvar.exp()[:, None, None]  # (B, 1, 1, Nl, P)
    total = variance + 1 / scale
    product = (u * mean / total).sum(-1)  # (B, H, Nt, Nl)
    if key_bias is not None:
        product = product + scale * torch.einsum("bhte,he->bht", query, key_bias)[..., None]
    if softcap is not None:
        product = softcap * torch.tanh(product / softcap)
    norms = mean.square() + u.square() if exact else mean.square()
    log_normal = product - 0.5 * (norms / total + total.log()).sum(-1)
    weights = (log_pi[:, None, None] + log_normal).softmax(-1)
    denoised = (variance * u + mean / scale) / total  # (B, H, Nt, Nl, P)
    output = torch.einsum("bhtj,bhtjp,hep->bhte", weights, denoised, value_weight)
    return output if value_bias is None else output + value_bias[None, :, None]


# ------------------------------------------------------------------------------------------------- packing
# The only tensor that reaches every cross-attention of every architecture is ``encoder_hidden_states``. What attention
# reads of a latent therefore travels as its last axis:
#
#     [ vectors (P) | bias (3, padded to 8) ]                       points: a sample, or the means
#     [ vectors (P) | shrinkage (P) | bias (3, padded to 8) ]       a mixture of Gaussians
#
# The bias is split in three summands that a cast to half precision does not round, so the packed tensor can have the
# model's dtype and survives autocast and mixed-precision wrappers.
BIAS_WIDTH = 8  # three channels, padded so that the packed rows stay aligned


def pack(latent: AttendedLatent) -> Tensor:
    """One tensor ``(B, Nl, P + 8)``, or ``(B, Nl, 2 P + 8)`` with shrinkage, in the vectors' dtype."""
    dtype = latent.vectors.dtype
    channels = three_summands(latent.bias)
    bias = F.pad(channels, (0, BIAS_WIDTH - channels.shape[-1])).to(dtype)
    parts = [latent.vectors, bias] if latent.shrinkage is None else [latent.vectors, latent.shrinkage, bias]
    return torch.cat(parts, dim=-1)


def unpack(packed: Tensor, width: int) -> AttendedLatent:
    """What :func:`pack` was given, for latent vectors of ``width`` ``P``.

    Raises:
        ValueError: the last axis is neither ``P + 8`` nor ``2 P + 8``.
    """
    size = packed.shape[-1]
    if size not in (width + BIAS_WIDTH, 2 * width + BIAS_WIDTH):
        raise ValueError(
            f"The decoder of an NVIB model reads latents, but encoder_hidden_states is {size} wide where a latent "
            f"of this model is {width + BIAS_WIDTH} or {2 * width + BIAS_WIDTH}. Pass the model's inputs, or "
            "encoder_outputs from encode(), sample_latents() or interpolate_latents() of this model. If you call the "
            "base: wrapping has changed it, so wrap copy.deepcopy(base) to keep it."
        )
    three = packed[..., -BIAS_WIDTH : -BIAS_WIDTH + 3]
    bias = (three if three.dtype == torch.float64 else three.float()).sum(-1)
    shrinkage = None if size == width + BIAS_WIDTH else packed[..., width : 2 * width]
    return AttendedLatent(packed[..., :width], bias, shrinkage)
