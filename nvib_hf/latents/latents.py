"""``NvibLatents``: the latents of texts, images or sounds, to save, join and interpolate."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from safetensors.torch import save as serialise
from torch import Tensor
from torch.nn import functional as F

from ..files import write_whole
from ..layers.denoising_attention import AttendedLatent, attended_means, attended_mixture, attended_points
from ..layers.distributions import NvibOutput
from ..layers.dropping import kept_first
from .checks import check_number, shared_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray

    # What selects latents of a batch: a number, a slice, a list, an array or a mask.
    Rows = SupportsIndex | slice | Sequence[int] | Tensor | NDArray[Any]


@dataclasses.dataclass(repr=False)
class NvibLatents:
    """Latents of a batch, which :meth:`~nvib_hf.NvibForConditionalGeneration.generate` decodes.

    They are a sequence over the batch: ``len(latents)``, iteration (batches of one), ``latents[0]``, ``latents[2:4]``,
    ``latents[[0, 2]]``, a mask. They are also a mapping over the fields that are not ``None``: ``latents["z"]``,
    ``"z" in latents``, ``keys()``, ``items()``, ``dict(latents)``, ``**latents``.

    Args:
        z: vectors ``(B, Nl, P)``: a sample, or the means if ``logvar`` is given.
        log_pi: log mixture weights ``(B, Nl)``, ``-inf`` where a vector is padding or dropped.
        attention_mask: ``(B, Nl)``, True where a vector is no padding (dropped vectors included).
        logvar: log-variances ``(B, Nl, P)`` of the mixture; ``None`` for a sample.
        log_alpha: log pseudo-counts ``(B, Nl)``, ``-inf`` where padding; component 0 is the prior's. ``None`` if the
            latents encode no text.
        kl_gaussian, kl_dirichlet: ``(B,)``, in nats, as the loss weighs them. ``None`` if no text is encoded.
        num_vectors: ``(B,)``, source vectors kept, without the prior's; prop_vectors: their share of the source
            length; effective_vectors: ``exp(entropy(pi))``. ``None`` if no text is encoded.
        relaxed_prop_vectors: ``(B,)``, :func:`~nvib_hf.layers.dropping.relaxed_share`; ``None`` if nothing can drop
            vectors.
        kappa: ``(B,)``, vectors drawn per component in a sample; ``None`` otherwise.
        scale: ``(B,)``, the scale of the attention that the weights fit; ``None`` if it is not known.
        num_stored: ``(B,)``, how many of the last vectors are stored silence, which is not merged; ``None`` unless a
            model with ``encode_sound_only`` made them.
    """

    z: Tensor
    log_pi: Tensor
    attention_mask: Tensor
    logvar: Tensor | None = None
    log_alpha: Tensor | None = None
    kl_gaussian: Tensor | None = None
    kl_dirichlet: Tensor | None = None
    num_vectors: Tensor | None = None
    prop_vectors: Tensor | None = None
    relaxed_prop_vectors: Tensor | None = None
    effective_vectors: Tensor | None = None
    kappa: Tensor | None = None
    scale: Tensor | None = None
    num_stored: Tensor | None = None

    @classmethod
    def of(cls, output: NvibOutput | NvibLatents, scale: float) -> NvibLatents:
        """Latents from an NVIB layer's output, for attention of this scale, with KLs and counts if it has KLs.

        If another bottleneck replaces the layer and returns latents, they stay as they are.
        """
        if isinstance(output, NvibLatents):
            return output
        posterior, drawn, kappa = output.posterior, output.drawn, output.kappa
        latents = cls(
            z=output.z,
            log_pi=output.log_pi,
            logvar=posterior.logvar if kappa is None else None,
            attention_mask=drawn.mask,
        )
        if output.kl_gaussian is None:
            return latents
        statistics = posterior.statistics()
        return dataclasses.replace(
            latents,
            log_alpha=drawn.log_alpha.masked_fill(~drawn.mask, float("-inf")),
            kl_gaussian=output.kl_gaussian,
            kl_dirichlet=output.kl_dirichlet,
            num_vectors=statistics["num_vec"],
            prop_vectors=statistics["prop_vec"],
            relaxed_prop_vectors=output.relaxed_share,
            effective_vectors=statistics["effective_num_vec"],
            kappa=None if kappa is None else torch.full_like(statistics["num_vec"], kappa, dtype=torch.long),
            scale=torch.full_like(statistics["num_vec"], scale),
        )

    def keys(self) -> list[str]:
        """The names of the fields that are not ``None``."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]

    def items(self) -> list[tuple[str, Tensor]]:
        """The fields that are not ``None``, by name."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def values(self) -> list[Tensor]:
        """The fields that are not ``None``."""
        return [value for _, value in self.items()]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    @overload
    def __getitem__(self, index: str) -> Tensor: ...
    @overload
    def __getitem__(self, index: Rows) -> NvibLatents: ...
    def __getitem__(self, index: str | Rows) -> Tensor | NvibLatents:
        if isinstance(index, str):
            if index not in self:
                raise KeyError(f"these latents have no {index!r}, but {', '.join(self.keys())}")
            field: Tensor = getattr(self, index)
            return field
        rows = index if isinstance(index, slice) else self._rows(index)
        return type(self)(**{name: value[rows] for name, value in self.items()})

    def _rows(self, index: Any) -> list[int] | Tensor:
        """What an index that is not a slice selects: one latent as a batch of one, or several."""
        if getattr(index, "ndim", 0) == 0 and hasattr(index, "__index__"):
            position = operator.index(index)
            if not -self.batch_size <= position < self.batch_size:
                raise IndexError(f"index {position} is out of range for {self.batch_size} latents.")
            return [position]
        if hasattr(index, "__len__") and not isinstance(index, (tuple, NvibLatents)):
            rows = torch.as_tensor(index, device=self.device)
            if rows.ndim == 1:
                return rows if len(rows) else []
        raise TypeError(
            "The index of latents must be a number, a slice, a list, a one-dimensional array or a mask, but got "
            f"{'latents' if isinstance(index, NvibLatents) else repr(index)}. To look into a field, index the "
            "field, as in latents.z[0, 1]."
        )

    def __repr__(self) -> str:
        if not isinstance(self.z, Tensor):  # a tree of something else, as torch.export makes them
            return object.__repr__(self)
        batch, length, width = self.z.shape
        kind = "samples" if self.logvar is None else "posteriors"
        size = f"{length} vectors, the prior's included" if self.log_alpha is not None else f"{length} vectors"
        return f"NvibLatents({batch} {kind} of up to {size}, {width} wide, {self.z.dtype}, {self.z.device})"

    def __len__(self) -> int:
        return self.batch_size

    def __iter__(self) -> Iterator[NvibLatents]:
        return (self[row] for row in range(len(self)))

    def __reversed__(self) -> Iterator[NvibLatents]:
        return (self[row] for row in reversed(range(len(self))))

    @property
    def batch_size(self) -> int:
        return self.z.shape[0]

    @property
    def device(self) -> torch.device:
        return self.z.device

    def to(self, *args: Any, **kwargs: Any) -> NvibLatents:
        """A copy on another device or in another dtype. Only ``z`` and ``logvar`` change their dtype."""
        moved = {name: x.to(*args, **kwargs) for name, x in self.items() if name in ("z", "logvar")}
        where = {"device": moved["z"].device, "non_blocking": kwargs.get("non_blocking", False)}
        return type(self)(**{name: moved[name] if name in moved else x.to(**where) for name, x in self.items()})

    def detach(self) -> NvibLatents:
        return type(self)(**{name: value.detach() for name, value in self.items()})

    def compact(self) -> NvibLatents:
        """Latents without the vectors that decoding cannot see, as short as the batch's longest latent allows.

        The order stays, and so does the output of a decoder. This reads a length from the device.
        """
        order = kept_first(self.log_pi > float("-inf")) if self.batch_size else None
        if order is None:
            return self

        def gather(value: Tensor) -> Tensor:
            return value.take_along_dim(order if value.dim() == 2 else order[..., None], dim=1)

        return type(self)(**{name: value if value.dim() == 1 else gather(value) for name, value in self.items()})

    def pooled(self) -> Tensor:
        r"""The mean of each mixture, :math:`\sum_i \pi_i \mu_i`: ``(B, P)`` for any length, in at least fp32.

        Use it for nearest neighbours and clustering. Distances between means are never above
        :func:`~nvib_hf.latent_distance`.
        """
        z = self.z.to(torch.promote_types(self.z.dtype, torch.float32))
        keep = self.log_pi > float("-inf")
        return (self.log_pi.to(z.dtype).softmax(-1)[..., None] * z.masked_fill(~keep[..., None], 0)).sum(1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fields, in their dtypes, into one safetensors file: all of it or nothing.

        Its metadata hold the width and the attention's scale, which a model that decodes the latents must share.
        """
        fields = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in self.items()}
        metadata = {"format": "pt", "width": str(self.z.shape[-1])}
        if (scale := shared_scale(self)) is not None and len(scale):
            metadata["scale"] = repr(scale[0].item())
        write_whole(path, serialise(fields, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> NvibLatents:
        """Load what :meth:`save` wrote, to ``device``, by default the CPU.

        Raises:
            FileNotFoundError: there is no such file. ValueError: the file holds no latents, or is a folder.
        """
        remedy = "Pass a file that NvibLatents.save() wrote. To load a model, call from_pretrained()."
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder. {remedy}")
        try:
            # One read of one file: load_file() opens the path twice, and may find another file the second time.
            tensors = load(Path(path).read_bytes())
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}). {remedy} For a torch.save() file use torch.load()."
            ) from error
        unknown = sorted(tensors.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            raise ValueError(
                f"{path} holds no latents: {unknown[0]!r}, one of {len(tensors)} tensors, is not one of their fields. "
                f"{remedy}"
            )
        missing = sorted({"z", "log_pi", "attention_mask"} - tensors.keys())
        if missing:
            raise ValueError(f"{path} holds no latents: it lacks {', '.join(map(repr, missing))}. {remedy}")
        return cls(**tensors) if device is None else cls(**tensors).to(device)

    def attended(self, scale: float, evaluation: str) -> AttendedLatent:
        """What denoising attention with this ``scale`` reads of the latents: points, or a mixture of Gaussians.

        Args:
            scale: the attention's scale ``s``.
            evaluation: ``"means"`` reads a posterior's means, ``"mixture"`` the posterior itself. For a sample both
                read its points.
        """
        if self.logvar is None:
            return attended_points(self.z, self.log_pi, scale)
        of_posterior = attended_means if evaluation == "means" else attended_mixture
        return of_posterior(self.z, self.logvar, self.log_pi, scale)


torch.serialization.add_safe_globals([NvibLatents])
# torch.export and fully sharded training find tensors through such trees.
torch.utils._pytree.register_pytree_node(
    NvibLatents,
    lambda latents: ([value for _, value in latents.items()], latents.keys()),
    lambda values, names: NvibLatents(**dict(zip(names, values, strict=True))),
    flatten_with_keys_fn=lambda latents: (
        [(torch.utils._pytree.MappingKey(name), value) for name, value in latents.items()],
        latents.keys(),
    ),
    serialized_type_name=f"{NvibLatents.__module__}.NvibLatents",
)


def concatenate_latents(latents: list[NvibLatents]) -> NvibLatents:
    """Join several batches of latents into one. Shorter latents are padded. A field that one batch lacks is left out.

    If some are samples and some are mixtures, samples become mixtures of variance 0.
    """
    if not latents:
        raise ValueError("latents is empty. Pass at least one.")
    widths = sorted({x.z.shape[-1] for x in latents})
    if len(widths) > 1:
        raise ValueError(f"The latents have widths {widths}: they come from different models and make no batch.")
    shared_scale(*latents)
    length = max(x.z.shape[1] for x in latents)
    mixture = any(x.logvar is not None for x in latents)
    padded = [dict(pad_latents(x, length, with_logvar=mixture)) for x in latents]
    shared = [name for name in padded[0] if all(name in x for x in padded)]
    return NvibLatents(**{name: torch.cat([x[name] for x in padded]) for name in shared})


def pad_latents(latents: NvibLatents, length: int, with_logvar: bool) -> NvibLatents:
    """Latents padded to ``length`` vectors. With ``with_logvar``, a sample gets log-variances of ``-inf``."""
    fields = dict(latents.items())
    if with_logvar and "logvar" not in fields:
        fields["logvar"] = torch.full_like(latents.z, float("-inf"))
    missing = length - latents.z.shape[1]
    for name, value in fields.items():
        fill = {"z": 0, "logvar": 0, "attention_mask": False}.get(name, float("-inf"))
        if value.dim() == 2:
            fields[name] = F.pad(value, (0, missing), value=fill)
        elif value.dim() == 3:
            fields[name] = F.pad(value, (0, 0, 0, missing), value=fill)
    return NvibLatents(**fields)


def broadcast_pair(
    first: NvibLatents, second: NvibLatents, weight: float | Tensor
) -> tuple[NvibLatents, NvibLatents, Tensor]:
    """Two latents of one batch size, and weights ``(B, 1)`` between them. A batch of one is repeated as needed.

    Raises:
        ValueError: weights outside [0, 1]; batch sizes or widths that do not fit.
    """
    shapes = f"{tuple(first.z.shape)} and {tuple(second.z.shape)}"
    if first.z.shape[-1] != second.z.shape[-1] or len({first.batch_size, second.batch_size} - {1}) > 1:
        raise ValueError(
            f"Latents of shapes {shapes} do not fit: widths must be equal, and batch sizes too unless one of them is "
            "1."
        )
    if isinstance(weight, str) or not hasattr(weight, "__len__"):
        weight = check_number("weight", weight)
    given, weight = weight, torch.as_tensor(weight, dtype=first.log_pi.dtype, device=first.z.device)
    if not ((weight >= 0) & (weight <= 1)).all():
        raise ValueError(f"weight must be in [0, 1], but got {given}. 0 is the first batch, 1 the second.")
    sizes = {first.batch_size, second.batch_size, *weight.shape} - {1}
    if weight.dim() > 1 or len(sizes) > 1:
        size = second.batch_size if first.batch_size == 1 else first.batch_size
        raise ValueError(
            f"weight must be a number or one value for each of the {size} latents, but has shape "
            f"{tuple(weight.shape)}."
        )
    size = sizes.pop() if sizes else 1
    first, second = (x if x.batch_size == size else x[[0] * size] for x in (first, second))
    return first, second, weight.expand(size)[:, None]


def interpolate(first: NvibLatents, second: NvibLatents, weight: float | Tensor) -> NvibLatents:
    r"""The mixture :math:`(1 - t) F_a + t F_b` of two distributions: their components side by side.

    Args:
        first, second: latents of the same batch size, or a batch of one; lengths may differ.
        weight: ``t`` in [0, 1], a number or ``(B,)``; 0 is ``first``. Several weights for two batches of one give
            several latents between the two.

    Raises:
        ValueError: weights outside [0, 1]; batch sizes or widths that do not fit.

    Source: Henderson & Fehr (ICLR 2023), interpolation.
    """
    first, second, weight = broadcast_pair(first, second, weight)
    scale = shared_scale(first, second)
    mixture = first.logvar is not None or second.logvar is not None
    first, second = (pad_latents(x, x.z.shape[1], with_logvar=mixture) for x in (first, second))
    return NvibLatents(
        z=torch.cat([first.z, second.z], dim=1),
        log_pi=torch.cat([first.log_pi + (1 - weight).log(), second.log_pi + weight.log()], dim=1),
        logvar=torch.cat([first["logvar"], second["logvar"]], dim=1) if mixture else None,
        attention_mask=torch.cat([first.attention_mask, second.attention_mask], dim=1),
        scale=scale,
    )
