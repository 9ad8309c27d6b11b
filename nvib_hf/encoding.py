"""Latents of a model: encoded, drawn from the prior, interpolated; and the prior fitted to a corpus."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from .base_model import run_encoder, source_padding
from .dropping import kept_first
from .initialisation import EmpiricalPrior, empirical_prior
from .latent import NvibLatents, interpolate, pack
from .latent_transport import interpolate_by_transport
from .latent_variation import blend, vary
from .nvib_layer import Nvib
from .validation import check_choice

# What stands for the encoder's inputs: its output.
STATES = "encoder_last_hidden_state"


class NvibBottleneck(Nvib):
    """The NVIB layer of a model: :class:`~nvib_hf.Nvib` from the encoder's output straight to latents.

    All its parameters are used within one call, which is what offloading and sharding expect of a module.
    """

    def forward(
        self,
        hidden_states: Tensor,
        padding_mask: Tensor | None = None,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        decode_only: bool = False,
    ) -> NvibLatents:
        """Encoder output ``(B, Ns, H)`` and mask ``(B, Ns)``, True = padding, to latents; see ``encode``.

        With ``decode_only`` they are what decoding reads of the posterior: its KLs and statistics are not computed,
        nor anything for the vectors that it drops.
        """
        sample = self.training if sample is None else sample
        if decode_only and not sample:
            posterior = self.posterior(*self.without_dropped(hidden_states, padding_mask))
            mean, log_pi, _ = self.draw(posterior, sample=False)
            return NvibLatents(z=mean, log_pi=log_pi, logvar=posterior.logvar, attention_mask=posterior.mask)
        posterior = self.posterior(hidden_states, padding_mask)
        statistics = posterior.statistics()
        z, log_pi, drawn = self.draw(posterior, sample, generator)
        kl_gaussian, kl_dirichlet = self.kl(posterior, drawn, self.kappa if sample else 1)
        return NvibLatents(
            z=z,
            log_pi=log_pi,
            logvar=None if sample else posterior.logvar,
            attention_mask=drawn.mask,
            log_alpha=drawn.log_alpha.masked_fill(~drawn.mask, float("-inf")),
            kl_gaussian=kl_gaussian,
            kl_dirichlet=kl_dirichlet,
            num_vectors=statistics["num_vec"],
            prop_vectors=statistics["prop_vec"],
            relaxed_prop_vectors=self.relaxed_share(posterior),
            effective_vectors=statistics["effective_num_vec"],
            dropped=drawn.dropped,
            full_log_pi=drawn.full_log_pi,
            kappa=torch.full_like(statistics["num_vec"], self.kappa, dtype=torch.long) if sample else None,
        )

    def without_dropped(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden_states`` ``(B, Ns, H)`` and their mask, less what evaluation drops; reads a length from the device.

        The posterior of the rest is the same, and costs no projection of vectors that nobody will see.
        """
        keep = self.is_kept(hidden_states)
        if padding_mask is not None:
            keep = keep & ~padding_mask.bool()
        order = kept_first(keep)
        if order is None:
            return hidden_states, padding_mask
        return hidden_states.take_along_dim(order[..., None], dim=1), ~keep.take_along_dim(order, dim=1)


class NvibEncodingMixin:
    """The half of :class:`~nvib_hf.NvibForConditionalGeneration` that makes latents."""

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        **inputs,
    ) -> NvibLatents:
        """Inputs to latents.

        Args:
            input_ids, attention_mask, inputs: what the base's encoder takes. Or, in place of them, what an earlier
                call of the model returned as ``encoder_last_hidden_state`` ``(B, Ns, H)``, with its mask if it has one
                (``(B, Ns)``, or as the encoder took it): a frozen encoder need not run again.
            sample: draw from the posterior (``kappa`` vectors a component), or take the posterior itself; by
                default as in training or evaluation, whichever mode the model is in.
            generator: for the draws.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        self._refuse_unknown_inputs(inputs)
        return self._encode_alone(inputs, sample, generator)[0]

    def _encode(
        self,
        inputs: dict,
        sample: bool | None = None,
        generator: torch.Generator | None = None,
        decode_only: bool = False,
    ) -> tuple[NvibLatents, BaseModelOutput]:
        """Latents, and the encoder's own output."""
        states = inputs.get(STATES)
        if states is None:
            outputs, padding = run_encoder(self.base, self._encoder_arguments(inputs))
        else:
            outputs = BaseModelOutput(last_hidden_state=states)
            padding = source_padding(self.base.get_encoder(), inputs.get("attention_mask"), states.shape[1])
        latents = self.nvib(
            outputs.last_hidden_state, padding, sample=sample, generator=generator, decode_only=decode_only
        )
        return latents, outputs

    def _encode_alone(self, *args, **kwargs) -> tuple[NvibLatents, BaseModelOutput]:
        """:meth:`_encode` outside of ``forward``, for which FSDP2 gathers parameters only if it is told."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

            if isinstance(self, FSDPModule):
                if "_encode_gathered" not in vars(self):
                    self._encode_gathered = self._encode
                    register_fsdp_forward_method(self, "_encode_gathered")
                return self._encode_gathered(*args, **kwargs)
        return self._encode(*args, **kwargs)

    def _encoder_arguments(self, inputs: dict) -> dict:
        return {k: v for k, v in inputs.items() if k in self._encoder_argument_names and v is not None}

    def _refuse_unknown_inputs(self, inputs: dict) -> None:
        """A misspelt mask would be left out without a word."""
        given = [name for name, value in inputs.items() if value is not None]
        refuse_unknown(given, type(self).__name__, self._argument_names)

    @torch.no_grad()
    def sample_latents(
        self,
        num_samples: int,
        num_vectors: int | Sequence[int] | Tensor,
        generator: torch.Generator | None = None,
    ) -> NvibLatents:
        """Latents from the prior: new text from nothing.

        Args:
            num_samples: how many.
            num_vectors: vectors of each, one number or one a sample, at least 1.

        Raises:
            ValueError: counts below 1, or not one a sample.

        Source: Henderson & Fehr (ICLR 2023), with weights drawn from the prior's Dirichlet.
        """
        if num_samples != int(num_samples) or num_samples < 1:
            raise ValueError(f"num_samples must be a whole number of at least 1, but got {num_samples}.")
        counts = torch.as_tensor(num_vectors, device=self.device)
        if counts.is_floating_point() or (counts < 1).any():
            raise ValueError(f"num_vectors must be whole numbers of at least 1, but got {num_vectors}.")
        if counts.dim() > 1 or (counts.dim() == 1 and len(counts) != num_samples):
            raise ValueError(
                f"num_vectors must be one number or one for each of num_samples={num_samples}, but got {num_vectors}."
            )
        counts = counts.expand(num_samples)
        padding = torch.arange(int(counts.max()), device=self.device) >= counts[:, None]
        z, log_pi = self.nvib.sample_prior(padding, generator)
        return NvibLatents(z=z.to(self.dtype), log_pi=log_pi, attention_mask=~padding)

    def interpolate_latents(
        self, first: NvibLatents, second: NvibLatents, weight: float | Tensor, method: str = "transport"
    ) -> NvibLatents:
        """Between two batches of latents: ``weight`` 0 is ``first``, 1 is ``second``; a number or ``(B,)``.

        A batch of one is repeated: ``weight=torch.linspace(0, 1, 5)`` between two latents is a walk of five steps.

        Args:
            method: ``"transport"`` moves the components of the one to those of the other
                (:func:`~nvib_hf.latent_transport.interpolate_by_transport`); ``"mixture"`` puts both side by side, as
                published (:func:`~nvib_hf.latent.interpolate`).

        Raises:
            ImportError: ``"transport"`` without the package POT.
            ValueError: another method; weights outside [0, 1]; batch sizes that do not fit; latents of another model.
        """
        methods = {"transport": interpolate_by_transport, "mixture": interpolate}
        check_choice("method", method, tuple(methods))
        for latents in (first, second):
            self._check_latents(latents)
        return methods[method](first, second, weight)

    @torch.no_grad()
    def vary_latents(
        self,
        latents: NvibLatents,
        temperature: float = 1.0,
        redraw_weights: bool = False,
        generator: torch.Generator | None = None,
    ) -> NvibLatents:
        """New text close to old one: a draw around each latent; see :func:`~nvib_hf.latent_variation.vary`."""
        self._check_latents(latents)
        return vary(latents, temperature, redraw_weights, generator)

    @torch.no_grad()
    def blend_latents(
        self,
        latents: NvibLatents,
        num_samples: int,
        num_parents: int = 2,
        generator: torch.Generator | None = None,
    ) -> NvibLatents:
        """New text between old ones: random latents on the way; see :func:`~nvib_hf.latent_variation.blend`."""
        self._check_latents(latents)
        return blend(latents, num_samples, num_parents, generator)

    def _check_latents(self, latents: NvibLatents) -> None:
        if latents.z.shape[-1] != self.nvib.size_out:
            raise ValueError(
                f"The latents are {latents.z.shape[-1]} wide, but this model's are {self.nvib.size_out}: they come "
                "from another model. Encode the texts with this one."
            )
        shapes = {name: tuple(x.shape) for name, x in latents.items() if name in ("z", "logvar", "log_pi")}
        if shapes["log_pi"] != shapes["z"][:2] or shapes.get("logvar", shapes["z"]) != shapes["z"]:
            raise ValueError(
                f"The latents' fields do not belong together: {shapes}. z and logvar are (B, Nl, P), log_pi (B, Nl)."
            )
        if latents.kappa is not None and (latents.kappa != self.nvib.kappa).any():
            raise ValueError(
                f"The latents were drawn with kappa={latents.kappa.unique().tolist()}, but this model has kappa="
                f"{self.nvib.kappa}: they come from another model. Encode the texts with this one."
            )

    def _pack(self, latents: NvibLatents) -> Tensor:
        return pack(latents.memory(self.scale, self.config.evaluation))

    @torch.no_grad()
    def fit_prior(self, batches: Iterable[dict[str, Tensor]]) -> EmpiricalPrior:
        """Take the prior from the encoder's output over a corpus, and initialise the layer for it again.

        Args:
            batches: the model's inputs, for instance a ``DataLoader``.

        Source: Fehr & Henderson (COLM 2024), empirical priors.
        """
        training = self.training

        def encoded():
            for batch in batches:
                inputs = {k: v.to(self.device) for k, v in self._encoder_arguments(batch).items()}
                outputs, padding = run_encoder(self.base, inputs)
                yield outputs.last_hidden_state, padding

        self.eval()
        try:
            prior = empirical_prior(encoded(), self.scale)
        finally:
            self.train(training)
        self.nvib.set_prior(*prior)
        self.nvib.identity_init(self.config.tau_alpha, self.config.tau_sigma, self.config.tau_mu)
        return prior


def refuse_unknown(arguments: Iterable[str], taker: str, known: Iterable[str] = ()) -> None:
    """Raise TypeError for arguments that are not ``known``, with the nearest name."""
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "Leave it out."
            raise TypeError(f"{taker} takes no argument {name!r}. {hint}")
