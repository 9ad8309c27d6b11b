"""Codes of a learned prior that follow the posteriors while these are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .codebook import shrunk_variances, sums_by_code
from .nvib import SinglePrecisionMixin

if TYPE_CHECKING:
    from .latent_prior import LatentPrior

MOVING = 0.01  # what a batch counts in the moving means
ROWS = 1024  # texts at a time, of all
NOTHING = 1e-9  # vectors a batch, on average, below which a code stays where it is


class MovingCodes(SinglePrecisionMixin, nn.Module):
    r"""What the codes of a prior are the means of: moving means over batches, and how they move.

    .. math:: n_k \leftarrow (1 - \epsilon) n_k + \epsilon \, |B_k|, \qquad
        S_k \leftarrow (1 - \epsilon) S_k + \epsilon \sum_{i \in B_k} z_i

    with the vectors :math:`B_k` of a batch that are nearest to a code, and in the same way their squares and those of
    draws. A code is :math:`S_k / n_k`. One that no vector is near stays where it is. What places explain stays too.

    Args:
        num_codes, width: of the prior.

    Source: van den Oord et al., *Neural Discrete Representation Learning* (2017), appendix A.1; the variances are
    this project's.
    """

    num_batches: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("num_batches", torch.ones(()))  # that all texts are
        self.register_buffer("counts", torch.zeros(num_codes))  # of a batch
        self.register_buffer("sums", torch.zeros(num_codes, 3 * width))

    @torch.no_grad()
    def start(self, prior: LatentPrior, mu: Tensor, logvar: Tensor, mask: Tensor, num_batches: int) -> None:
        """Set the means to those of all posteriors ``(N, n, P)``, which are ``num_batches`` batches."""
        self.num_batches.fill_(num_batches)
        self.counts.zero_()
        self.sums.zero_()
        for some in zip(*(x.split(ROWS) for x in (mu, logvar, mask)), strict=True):
            counts, sums = _of_batch(prior, *some)
            self.counts.add_(counts / num_batches)
            self.sums.add_(sums / num_batches)

    @torch.no_grad()
    def follow(self, prior: LatentPrior, mu: Tensor, logvar: Tensor, mask: Tensor, log_weight: Tensor) -> None:
        """Move codes, variances, chances of lengths and the weight of vectors by a batch ``(B, n, P)``.

        Args:
            log_weight: of each vector, that of the prior's component being 0: ``(B, n)``.
        """
        counts, sums = _of_batch(prior, mu, logvar, mask)
        self.counts.lerp_(counts, MOVING)
        self.sums.lerp_(sums, MOVING)
        known = self.counts[:, None] > NOTHING
        means, squares, of_draws = (self.sums / self.counts.clamp(min=NOTHING)[:, None]).chunk(3, -1)
        prior.centres.copy_(torch.where(known, means, prior.centres))
        in_all = self.counts * self.num_batches
        for buffer, second in ((prior.logvar, squares), (prior.draws_logvar, of_draws)):
            variances = (second - means.square()).clamp(min=0)
            buffer.copy_(shrunk_variances(in_all[:, None] * variances, in_all).log())
        seen = nn.functional.one_hot(mask.sum(-1).clamp(min=1) - 1, prior.max_length).to(prior.log_lengths).mean(0)
        prior.log_lengths.copy_(prior.log_lengths.exp().lerp(seen, MOVING).log())
        mean_weight = (log_weight.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)).to(prior.log_weight)
        prior.log_weight.lerp_(mean_weight, MOVING)


def _of_batch(prior: LatentPrior, mu: Tensor, logvar: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of each code the number of vectors ``(K,)``; sums of them, their squares, those of draws ``(K, 3 P)``.

    Padding counts as nothing. To leave it out would give a compiled graph a length that depends on values.
    """
    residuals = mu - prior.places[: mu.shape[1]]
    squares = residuals.square()
    values = torch.cat([residuals, squares, squares + logvar.exp(), torch.ones_like(mu[..., :1])], dim=-1)
    values = values.masked_fill(~mask[..., None], 0)
    sums, _ = sums_by_code(values.flatten(0, 1), prior.codes(mu).flatten(), prior.num_codes)
    return sums[:, -1], sums[:, :-1]
