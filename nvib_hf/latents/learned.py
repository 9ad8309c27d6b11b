"""Latents and the learned prior: its training on latents, draws from it, and what latents cost under it."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.latent_prior import LatentPrior, checked_sizes
from ..layers.moving_codes import MovingCodes
from ..layers.nvib import NvibLayer
from .checks import check_count, check_latents
from .latents import NvibLatents

if TYPE_CHECKING:
    from ..configuration_nvib import NvibConfig
    from ..layers.distributions import NvibOutput
    from ..layers.merging import Groups


class HasLatentPrior(Protocol):
    """What a learned prior needs of a model: where it is, the NVIB layer, and the configuration that tells of it."""

    config: NvibConfig
    nvib: NvibLayer
    latent_prior: LatentPrior | None

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...


def prior_of(config: NvibConfig, width: int) -> LatentPrior | None:
    """The learned prior that a configuration tells of, if it does."""
    if config.latent_prior is None:
        return None
    prior = LatentPrior(width, **config.latent_prior).float()
    if not config.latent_prior_frozen:
        prior.moving = MovingCodes(prior.num_codes, width)
    return prior


def check_prior_of_state(model: HasLatentPrior, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """A hook for before a state is loaded, as a Trainer does that resumes.

    Raises:
        ValueError: the state is of a model whose learned prior was trained with it, and this model's is not; or the
            other way round.
    """
    trained = any(name.startswith(f"{prefix}latent_prior.moving.") for name in state_dict)
    has_prior = any(name.startswith(f"{prefix}latent_prior.") for name in state_dict)
    if has_prior and model.latent_prior is not None and trained == model.config.latent_prior_frozen:
        first, then = ("unfreeze_latent_prior(latents)", "with") if trained else ("freeze_latent_prior()", "without")
        raise ValueError(
            f"The state was saved {then} its learned prior in training, but this model's is not as it was then. Load "
            f"the model from that checkpoint by from_pretrained, or call model.{first} first."
        )


def vectors_of(latents: NvibLatents) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a learned prior is of: vectors ``(B, n, P)``, their mask ``(B, n)`` and log-variances if there are any.

    Those that decoding sees, in their order, without the first, which is the prior's component.

    Raises:
        ValueError: samples of ``kappa > 1``; latents of no vector but the prior's.
    """
    if latents.kappa is not None and bool((latents.kappa > 1).any()):
        raise ValueError(
            f"The latents are draws of kappa={int(latents.kappa.max())} vectors for each of the text's. A learned "
            "prior is of one: use encode(..., sample=False)."
        )
    latents = latents.compact()
    keep = latents.log_pi > -math.inf
    mask = keep[:, 1:]
    if bool((mask.sum(-1) < 1).any()):
        row = int((mask.sum(-1) < 1).nonzero()[0])
        raise ValueError(f"Latent {row} has no vector but the prior's. Leave it out.")
    z = latents.z[:, 1:].masked_fill(~mask[..., None], 0).float()
    logvar = None if latents.logvar is None else latents.logvar[:, 1:].masked_fill(~mask[..., None], 0).float()
    return z, mask, logvar


def check_posteriors(model: HasLatentPrior, name: str, given: object) -> None:
    """Raise TypeError or ValueError if the argument of this name is no posterior of the model."""
    if not isinstance(given, NvibLatents):
        raise TypeError(
            f"{name} must be NvibLatents, but got {type(given).__name__}. Pass encode_texts(model, tokenizer, texts)."
        )
    check_latents(given, model.nvib)
    if given.logvar is None:
        raise ValueError(f"{name} are samples. Pass posteriors: encode_texts, or encode(..., sample=False).")


def with_prior_component(model: HasLatentPrior, z: Tensor, mask: Tensor, log_weight: Tensor) -> NvibLatents:
    """Vectors as latents of a model: its prior's component in front, and one weight for all others."""
    keep = F.pad(mask, (1, 0), value=True)
    log_pi = F.pad(log_weight.float().expand(mask.shape), (1, 0)).masked_fill(~keep, -math.inf).log_softmax(-1)
    first = model.nvib.prior_mu.to(z).expand(len(z), 1, z.shape[-1])
    z = torch.cat([first, z], dim=1).to(model.dtype)
    scale = torch.full_like(log_pi[:, 0], float(model.nvib.scale))
    return NvibLatents(z=z, log_pi=log_pi, attention_mask=keep, scale=scale)


def fitted_prior(model: HasLatentPrior, purpose: str) -> LatentPrior:
    """The model's learned prior; ValueError, which names what it is needed for, where there is none."""
    prior = model.latent_prior
    if prior is None or not bool(prior.is_fitted):
        state = "has no learned prior" if prior is None else "has a learned prior that was never fitted"
        raise ValueError(
            f"{purpose} needs a learned prior, but this model {state}. Call "
            "model.fit_latent_prior(encode_texts(model, tokenizer, texts), held_out) first."
        )
    return prior


def check_adapters(model: HasLatentPrior, prior: LatentPrior) -> None:
    """Warn that adapters of PEFT are saved without the learned prior; raise ValueError if one is in the prior."""
    if not hasattr(model, "peft_config"):
        return
    if any(type(part).__module__.startswith("peft.") for part in prior.modules()):
        raise ValueError(
            "An adapter of PEFT has put modules into the learned prior, which then cannot be trained and saved as "
            'one. Make it with exclude_modules=r"latent_prior\\..*", and without latent_prior in modules_to_save.'
        )
    warnings.warn(
        "The model has adapters of PEFT. Saving them does not save the learned prior, which this training changes: at "
        "the end call merge_and_unload(), and save the model that it returns.",
        stacklevel=3,
    )


def charged_by_prior(model: HasLatentPrior, made: NvibOutput, groups: Groups | None) -> Tensor:
    r"""What the loss charges for vectors while the learned prior is trained with the model, ``(B,)``.

    .. math:: \overline{KL_G} = \frac{1}{n' P} \, \mathrm{rate}(\mu, \sigma^2)

    with :meth:`LatentPrior.rate <nvib_hf.layers.latent_prior.LatentPrior.rate>` in the place of the divergence from
    independent Gaussians, in its units: a mean over the :math:`n'` components and the channels. In training, the codes
    follow the posteriors first.

    Args:
        made: of the NVIB layer.
        groups: which of its vectors were merged; ``None`` if none can be.
    """
    prior, posterior = model.latent_prior, made.posterior
    if prior is None or prior.moving is None:
        raise ValueError(
            "latent_prior_frozen=False was set in the configuration, but this model's learned prior is not in "
            "training. Call model.unfreeze_latent_prior(latents), which sets it too."
        )
    if prior.is_fitted.device.type == "cpu" and not torch.compiler.is_compiling():  # to look would wait for a device
        fitted_prior(model, "latent_prior_frozen=False")
    mu, logvar, mask = posterior.mu.float(), posterior.logvar.float(), made.drawn.keep
    log_alpha = posterior.log_alpha.float().masked_fill(~mask, -math.inf)
    if groups is None:  # what is left comes first, as the prior reads it
        order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)
        mu, logvar = (x.take_along_dim(order[..., None], dim=1) for x in (mu, logvar))
        mask, log_alpha = mask.gather(1, order), log_alpha.gather(1, order)
    else:
        mu, logvar = groups.of_draws(mu, logvar)
        log_alpha = groups.totals(log_alpha)
        mask = log_alpha > -math.inf
    mu, logvar, mask = mu[:, 1:], logvar[:, 1:], mask[:, 1:]  # without the prior's component
    if mu.shape[1] > prior.max_length:
        raise ValueError(
            f"The inputs have {mu.shape[1]} vectors, padding included, but the learned prior's max_length is "
            f"{prior.max_length}. Cut them, or fit a prior with sizes={{'max_length': ...}}."
        )
    if model.nvib.training:
        prior.moving.follow(prior, mu, logvar, mask, log_alpha[:, 1:] - log_alpha[:, :1])
    return prior.nats(mu, logvar, mask) / (posterior.mask.sum(-1) * mu.shape[-1])


def sample_from_learned_prior(
    model: HasLatentPrior,
    num_samples: int,
    num_vectors: Tensor | None,
    temperature: float,
    top_p: float,
    noise: float,
    generator: torch.Generator | None,
) -> NvibLatents:
    """Latents as :meth:`LearnedPriorMixin.sample_latents` draws them where there is a learned prior."""
    prior = fitted_prior(model, "sample_latents")
    if num_vectors is not None:
        if not bool(((num_vectors >= 2) & (num_vectors <= 1 + prior.max_length)).all()):
            raise ValueError(
                "num_vectors must be whole numbers from 2, the prior's component and one more, to "
                f"{1 + prior.max_length}, which the learned prior knows of, but got {num_vectors.tolist()}."
            )
        num_vectors = num_vectors - 1
    z, mask = prior.sample(
        num_samples, num_vectors, temperature=temperature, top_p=top_p, noise=noise, generator=generator
    )
    return with_prior_component(model, z, mask, prior.log_weight)


class LearnedPriorMixin:
    """For a model whose NVIB layer is ``nvib`` and whose learned prior, if there is one, is ``latent_prior``."""

    def fit_latent_prior(
        self: HasLatentPrior,
        latents: NvibLatents,
        held_out: NvibLatents,
        *,
        sizes: dict[str, int] | None = None,
        seed: int = 0,
        **training: Any,
    ) -> list[dict[str, float]]:
        """Give the model a learned prior of these latents, and train it. All else of the model stays as it is.

        A prior that the model has already is replaced, once the new one is there. It learns which vectors follow each
        other, as a language model learns it of sub-words: it needs latents whose vectors stand in an order and are of
        few kinds. It was measured on texts. Latents of speech and images are taken too, without any promise.

        Args:
            latents, held_out: of texts, ``encode_texts(model, tokenizer, texts)``: posteriors, not samples. Of those
                held out none should be in the others.
            sizes: ``num_codes``, ``d_model``, ``num_layers``, ``num_heads``, ``max_length``; those that are left out
                are as in the configuration, or else ``max_length`` is that of the longest latent, and the others are
                :data:`~nvib_hf.layers.latent_prior.SIZES`.
            seed: of the codebook, the weights and the batches. The global random state stays as it is.
            training: of :func:`~nvib_hf.training.latent_prior_training.fit_latent_prior`: ``max_steps``,
                ``batch_size``, ``learning_rate``, ``evaluate_every``, ``patience``, ``progress``, ``checkpoint`` (a
                file from which the same call goes on if it was stopped).

        Returns:
            At each look at the held-out latents: ``step``, ``training_loss`` and ``held_out_loss``. The losses are the
            nats of a latent's codes. :meth:`log_prob` also has the density within each code, and may be far above or
            below. :meth:`rate` says what a text costs.

        Raises:
            TypeError: no latents, such as texts; an unknown size. ValueError: latents of another model, or samples;
                fewer vectors than codes; latents longer than ``max_length``; a ``checkpoint`` of other latents or
                settings.
        """
        from ..training.latent_prior_training import fit_latent_prior

        for name, given in (("latents", latents), ("held_out", held_out)):
            check_posteriors(self, name, given)
        (z, mask, logvar), (other, other_mask, _) = vectors_of(latents), vectors_of(held_out)
        longest = {"max_length": max(z.shape[1], other.shape[1])}
        sizes = checked_sizes(longest | (self.config.latent_prior or {}) | (sizes or {}))
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
            rows = [x[row].clone() for x, row in zip(z, mask, strict=True)]
            other_rows = [x[row].clone() for x, row in zip(other, other_mask, strict=True)]
            torch.manual_seed(seed)
            prior = LatentPrior(z.shape[-1], **sizes).to(self.device)
            history = fit_latent_prior(prior, rows, other_rows, seed=seed, **training)
        assert logvar is not None
        prior.fit_draws(z, logvar, mask)
        compact = latents.compact().log_pi
        prior.log_weight.copy_((compact[:, 1:] - compact[:, :1])[mask].mean())
        self.latent_prior = prior.requires_grad_(False).train(self.nvib.training)
        self.config.latent_prior, self.config.latent_prior_frozen = sizes, True
        return history

    def unfreeze_latent_prior(self: HasLatentPrior, latents: NvibLatents, batch_size: int = 64) -> None:
        """From now on, training trains the learned prior too, with all else that is not frozen.

        The loss then charges what the vectors cost under this prior (:meth:`rate`), in place of the divergence from
        independent Gaussians, by the same ``lambda_gaussian`` and ``kl_beta``; also in evaluation. The encoder learns
        to say what the prior expects, the prior what the encoder says. Codes and their variances follow the posteriors
        as moving means. Any Trainer or loop will do: the prior's parameters are the model's. Make the optimizer after
        this call. Models are saved and loaded as they are, in training or not. :meth:`freeze_latent_prior` ends it.

        With ``model.requires_grad_(False)`` before this call, training trains the prior alone. After ``freeze_base()``
        it trains the prior and the NVIB layer.

        Something has to hold the reconstruction, or else to raise the weight of what is charged, which is now much
        less: :class:`~nvib_hf.ConstraintCallback` with ``start_beta=None`` does both. In a loop of your own,
        ``model.kl_beta.mul_(1.02 if outputs.cross_entropy < 0.8 else 0.98)`` after each step is enough, with an upper
        bound such as ``10 * model.nvib.size_out``.

        Args:
            latents: those of the training's texts, ``encode_texts(model, tokenizer, texts)``.
            batch_size: of the training: it says how many batches are all texts.

        Raises:
            TypeError: no latents. ValueError: no learned prior; latents of another model, or samples, or fewer vectors
                than codes; settings that training the prior does not go with: ``kappa`` above 1, ``lambda_gaussian``
                of 0; an adapter of PEFT in the prior itself.

        Example:
            >>> model.fit_latent_prior(latents, held_out)  # doctest: +SKIP
            >>> model.unfreeze_latent_prior(latents)  # doctest: +SKIP
            >>> steering = ConstraintCallback(0.8, start_beta=None, rate=0.02)  # doctest: +SKIP
            >>> NvibTrainer(model, args, callbacks=[steering], ...).train()  # doctest: +SKIP
            >>> model.freeze_latent_prior()  # doctest: +SKIP
        """
        prior = fitted_prior(self, "unfreeze_latent_prior")
        check_posteriors(self, "latents", latents)
        batch_size = check_count("batch_size", batch_size)
        check_adapters(self, prior)
        if self.config.kappa > 1:
            raise ValueError(f"A learned prior is of one draw for each vector, but kappa is {self.config.kappa}.")
        if self.config.lambda_gaussian == 0:
            raise ValueError(
                "lambda_gaussian is 0, so the loss would not charge what vectors cost under the learned prior, and "
                "the prior would not learn. Set model.config.lambda_gaussian above 0."
            )
        mu, mask, logvar = vectors_of(latents.to(self.device))
        if (count := int(mask.sum())) < prior.num_codes:
            raise ValueError(
                f"latents have {count} vectors, fewer than the {prior.num_codes} codes of the prior. Pass those of "
                "all texts of the training."
            )
        moving = MovingCodes(prior.num_codes, prior.width).to(self.device)
        assert logvar is not None
        moving.start(prior, mu, logvar, mask, -(-len(latents) // batch_size))
        prior.moving = moving.train(prior.training)
        prior.requires_grad_(True)
        self.config.latent_prior_frozen = False

    def freeze_latent_prior(self: HasLatentPrior) -> None:
        """The end of :meth:`unfreeze_latent_prior`: the learned prior stays as it is, and the loss charges the
        divergence from independent Gaussians again."""
        if self.latent_prior is not None:
            self.latent_prior.moving = None
            self.latent_prior.requires_grad_(False)
        self.config.latent_prior_frozen = True

    @torch.no_grad()
    def log_prob(self: HasLatentPrior, latents: NvibLatents) -> Tensor:
        """Log-density of each latent's vectors under the learned prior, their number included, in nats: ``(B,)``.

        Of the means of posteriors. A density: of vectors of many channels it is far from 0, and only differences of
        latents with as many vectors say something. So it does not find unusual texts; :meth:`rate` does. Not of the
        weights, nor of the prior's component, which is the first vector. The vectors must stand in the order of their
        text, as in the latents of ``encode``, ``vary_latents`` and ``sample_latents``; transport mixes it.

        Raises:
            ValueError: no learned prior; latents of another model, longer than the prior knows, or of ``kappa > 1``.
                Texts are cut to what it knows by ``encode_texts(..., max_length=model.latent_prior.max_length)``.
        """
        prior = fitted_prior(self, "log_prob")
        check_latents(latents, self.nvib)
        z, mask, _ = vectors_of(latents)
        return evaluated(prior, "log_prob", z, mask)

    @torch.no_grad()
    def rate(self: HasLatentPrior, latents: NvibLatents) -> Tensor:
        """What the posteriors of texts cost under the learned prior, in nats, ``(B,)``: an upper bound.

        See :meth:`LatentPrior.rate <nvib_hf.layers.latent_prior.LatentPrior.rate>`: the code of each vector, and the
        divergence of its draws from those of the code. Not of the weights.

        ``model.rate(latents) / latents.num_vectors`` finds unusual texts, those whose score few held-out texts reach:
        it was above that of held-out texts in 99 % of pairs for texts of another domain and for words in random order,
        minus :meth:`log_prob` in 60 to 84 % (``examples/experiments/results/unusual_texts.md``).

        Raises:
            ValueError: as for :meth:`log_prob`; latents that are samples.
        """
        prior = fitted_prior(self, "rate")
        check_latents(latents, self.nvib)
        z, mask, logvar = vectors_of(latents)
        if logvar is None:
            raise ValueError("The latents are samples, whose rate is not known. Use encode(..., sample=False).")
        return evaluated(prior, "rate", z, logvar, mask)


def evaluated(prior: LatentPrior, name: str, *arguments: Any) -> Tensor:
    """A method of the prior without dropout."""
    training = prior.training
    prior.eval()
    try:
        result: Tensor = getattr(prior, name)(*arguments)
    finally:
        prior.train(training)
    return result
