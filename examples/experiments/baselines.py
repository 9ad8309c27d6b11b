r"""What NVIB is compared with: an autoencoder, and VAEs whose latent is a set of unweighted vectors.

Each is a bottleneck in the place of NVIB's, so that training, generation, sampling and measuring are the same code:

    model = with_bottleneck(bart, StridedBottleneck, lambda_gaussian=0.1, stride=2)

The vectors are :math:`z_i \sim \mathcal N(\mu_i, \sigma_i^2)` in training and :math:`\mu_i` in evaluation, their prior
is :math:`\mathcal N(0, 1)`, and the decoder reads them by plain attention: denoising attention scores a point with
:math:`s \, q^\top k + \log\pi - \tfrac s2 \lVert z \rVert^2`, so :math:`\log\pi = \tfrac s2 \lVert z \rVert^2` leaves
:math:`s \, q^\top k`. The prior's component stays in its place, 0, with no weight.

Source: the pooled, strided and variable baselines of Henderson & Fehr (ICLR 2023), section 4.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from nvib_hf import NvibForConditionalGeneration, NvibLatents
from nvib_hf.layers.distributions import Posterior, gaussian_sample
from nvib_hf.layers.kl import kl_gaussian
from nvib_hf.layers.nvib import NvibLayer


class VariableBottleneck(NvibLayer):
    """A Gaussian for every vector of the encoder, and no weights.

    ``kl_gaussian`` of the latents is normalised as NVIB's: a mean over the vectors that the decoder sees, and over
    channels. What a latent costs is that times their number and that of the channels.
    """

    def __init__(self, size_in: int, size_out: int, **options) -> None:
        super().__init__(size_in, size_out, **options)
        for parameter in (self.alpha_weight, self.alpha_quadratic, self.alpha_bias):
            parameter.requires_grad_(False)  # of pseudo-counts, which these latents do not have

    def forward(
        self,
        hidden_states: Tensor,
        padding_mask: Tensor | None = None,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        decode_only: bool = False,
    ) -> NvibLatents:
        """As of :class:`~nvib_hf.layers.nvib.NvibLayer`, but latents at once; always points, so without ``logvar`` in
        evaluation, and with nothing that ``decode_only`` would leave out.
        """
        sample = self.training if sample is None else sample
        mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        if padding_mask is not None:
            mask = ~padding_mask.bool()
        length = mask.sum(-1).clamp(min=1)
        vectors, mask = self.vectors(hidden_states.masked_fill(~mask[..., None], 0), mask)
        keep = self.chosen(mask)
        z, kl = self.points(vectors, keep, sample, generator)
        z, mask, keep = F.pad(z, (0, 0, 1, 0)), F.pad(mask, (1, 0), value=True), F.pad(keep, (1, 0))
        count = keep.sum(-1).float()
        return NvibLatents(
            z=z,
            log_pi=self.plain_log_pi(z, keep),
            attention_mask=mask,
            kl_gaussian=kl,
            kl_dirichlet=torch.zeros_like(kl),
            num_vectors=count,
            prop_vectors=count / length,
            effective_vectors=count,
        )

    def vectors(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the latent is made of, ``(B, N, H)``, and its mask ``(B, N)``; the input is 0 where padding."""
        return hidden_states, mask

    def chosen(self, mask: Tensor) -> Tensor:
        """Which of them the decoder sees, ``(B, N)``."""
        return mask

    def points(
        self, vectors: Tensor, keep: Tensor, sample: bool, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Vectors of the latent ``(B, N, P)`` and their KL ``(B,)``."""
        mu, logvar = self.mu_logvar(vectors).chunk(2, dim=-1)
        z = gaussian_sample(mu, logvar, keep, generator) if sample else mu.masked_fill(~keep[..., None], 0)
        equal = torch.zeros_like(keep, dtype=torch.float32)
        padding = {"memory_key_padding_mask": ~keep, "batch_first": True}
        prior = {"prior_mu": self.prior_mu, "prior_var": self.prior_logvar.exp()}
        return z, kl_gaussian(mu, logvar, log_alpha=equal, **padding, **prior)

    def plain_log_pi(self, z: Tensor, keep: Tensor) -> Tensor:
        """Weights with which denoising attention is plain attention: a softmax does not see that they sum to 1."""
        return (0.5 * self.scale * z.float().square().sum(-1)).masked_fill(~keep, float("-inf")).log_softmax(-1)

    def drawn(self, mask: Tensor) -> Tensor:
        """Which vectors of a sample from the prior the decoder sees, ``(B, N)``, of those that were asked for."""
        return mask

    def sample_prior(self, padding_mask: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Vectors from the prior, as many as the mask leaves, and the weights of plain attention."""
        keep = self.drawn(~padding_mask.bool())
        shape = (*keep.shape, self.size_out)
        z = gaussian_sample(self.prior_mu.expand(shape), self.prior_logvar.expand(shape), keep, generator)
        return z, self.plain_log_pi(z, keep)


def every(stride: int, mask: Tensor) -> Tensor:
    """Each ``stride``-th of the vectors that are not padding, from the first on."""
    return mask & ((mask.cumsum(-1) - 1) % stride == 0)


class StridedBottleneck(VariableBottleneck):
    """Every ``stride``-th vector, from the first on."""

    def __init__(self, *sizes: int, stride: int, **options) -> None:
        super().__init__(*sizes, **options)
        self.stride = stride

    def chosen(self, mask: Tensor) -> Tensor:
        return every(self.stride, mask)


class StridedNvib(NvibLayer):
    """NVIB that keeps what :class:`StridedBottleneck` keeps: by place, where a threshold would decide."""

    stride: int

    def posterior(self, *args, **kwargs) -> Posterior:
        posterior = super().posterior(*args, **kwargs)
        by_place = F.pad(every(self.stride, posterior.mask[:, 1:]), (1, 0), value=True)  # the prior's is always kept
        return posterior._replace(keep=posterior.keep & by_place)


class PooledBottleneck(VariableBottleneck):
    """The mean of all vectors: one for each text."""

    def vectors(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        mean = hidden_states.sum(1, keepdim=True) / mask.sum(-1).clamp(min=1)[:, None, None]
        return mean, mask.new_ones(len(mask), 1)

    def drawn(self, mask: Tensor) -> Tensor:
        return mask & (mask.cumsum(-1) == 1)  # the decoder knows latents of one vector alone


class AutoencoderBottleneck(VariableBottleneck):
    """None at all: the decoder reads the encoder's vectors, as in the base model."""

    def points(
        self, vectors: Tensor, keep: Tensor, sample: bool, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        return vectors.masked_fill(~keep[..., None], 0), vectors.new_zeros(len(vectors))

    def sample_prior(self, padding_mask: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        raise ValueError("An autoencoder has no prior to sample from. Use one of the VAEs.")


class BaselineModel(NvibForConditionalGeneration):
    """A model whose latents have no weights: transport moves equal ones, and they are read by plain attention."""

    def interpolate_latents(
        self, first: NvibLatents, second: NvibLatents, weight: float | Tensor, method: str = "transport"
    ) -> NvibLatents:
        if method != "transport":
            return super().interpolate_latents(first, second, weight, method)
        seen = [x.log_pi > float("-inf") for x in (first, second)]
        equal = [mask.float().log().log_softmax(-1) for mask in seen]
        first, second = (NvibLatents(x.z, *weights) for x, *weights in zip((first, second), equal, seen, strict=True))
        between = super().interpolate_latents(first, second, weight)
        plain = self.nvib.plain_log_pi(between.z, between.attention_mask)
        between.log_pi = (between.log_pi + plain).log_softmax(-1)
        return between


def with_bottleneck(
    base: PreTrainedModel,
    bottleneck: type[VariableBottleneck],
    *,
    lambda_gaussian: float = 0.0,
    tau_sigma: float = 0.0,
    **options,
) -> BaselineModel:
    """Wrap a base model; means start as the encoder's vectors, deviations at ``tau_sigma``, as NVIB's do.

    Args:
        base: changed in place.
        bottleneck: what stands between its encoder and its decoder.
        lambda_gaussian: weight of ``kl_gaussian`` in the loss, per target token.
        options: of the bottleneck.
    """
    model = BaselineModel.from_base_pretrained(base, lambda_gaussian=lambda_gaussian)
    width = model.nvib.size_in
    model.nvib = bottleneck(width, width, scale=model.scale, **options)
    model.nvib.identity_init(tau_sigma=tau_sigma)
    return model


def with_stride(model: NvibForConditionalGeneration, stride: int) -> NvibForConditionalGeneration:
    """An NVIB model that keeps every ``stride``-th vector, changed in place."""
    model.nvib.__class__, model.nvib.stride = StridedNvib, stride  # the layer keeps its settings and parameters
    return model
