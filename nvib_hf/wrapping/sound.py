r"""Whisper over the sound only: its encoder need not run over silence, if the silence keeps its mass.

Whisper's window always has the same length, and most vectors that its decoder reads are silence. If you just remove
them, Whisper fails, because attention misses their mass. Here the encoder runs over the sound and ``MARGIN`` vectors
more. A few stored vectors stand for the rest of the window, and share the mass that the rest would have:

.. math:: w_k = \frac{N - n}{K}, \qquad k = 1 \ldots K

for a window of ``N`` vectors, ``n`` of them encoded. If the encoder's layers merge vectors, each one left of the ``n``
has the mass of all that it replaces, so that the whole window always has the mass ``N``.

Source: this project.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging

from ..configuration_nvib import NvibConfig
from ..layers.exporting import check_not_exporting
from .base import run_encoder
from .self_attention import ForwardPass
from .stacked_encoder import left_by_layers

logger = logging.get_logger(__name__)

MARGIN = 25  # vectors encoded after the sound, half a second
STRIDE = 2  # frames of features for each vector
STORED = 25  # vectors that stand for the rest of the window
SPAN = 2.0  # between the loudest and the quietest log-mel feature of a recording: 8 decades, divided by 4
NO_SOUND = -1.5  # a log-mel feature of a recording of zeros: (log10(1e-10) + 4) / 4
# The same in the silence beside speech, whose loudest value is about 10: Whisper's features end 8 decades below it,
# (log10(10) - 8 + 4) / 4. Over 32 short utterances merged to a quarter, tiny.en had 25.2 % word error with it and 32.9
# with NO_SOUND; with the padding of eight recordings 26.8, with that of artificial sounds 24.8 to 25.6.
BESIDE_SPEECH = -0.75


class Heard(NamedTuple):
    """Vectors of sound ``(B, Ns, H)``, then of silence, and the encoder's own output.

    ``padding`` ``(B, Ns)``, True = padding; ``log_mass`` ``(B, Ns)``, relative to one vector of the encoder that is
    not merged; ``num_stored`` ``(B,)``: how many of the last vectors are stored, ``None`` if every window was encoded
    whole; ``window``: how many vectors the encoder makes from a whole window, before any are merged.
    """

    outputs: BaseModelOutput
    vectors: Tensor
    padding: Tensor | None
    log_mass: Tensor | None
    num_stored: Tensor | None
    window: int


class SoundMixin(nn.Module):
    """For a model around Whisper (``base``) that stores vectors of silence."""

    base: PreTrainedModel
    config: NvibConfig
    silence: Tensor

    def make_silence(self) -> None:
        """Register a buffer ``silence``, which :meth:`store_silence` or a checkpoint fills.

        Raises:
            ValueError: the base is not Whisper; its encoder's layers drop vectors.
        """
        encoder = self.base.get_encoder()
        check_encoder(encoder, self.config.drops and "encoder" in self.config.attentions)
        weight = encoder.conv1.weight
        self.register_buffer("silence", weight.new_zeros(STORED, encoder.config.d_model))

    def store_silence(self) -> Self:
        """Encode only the sound from now on (``encode_sound_only``), and store silence as this model encodes it.

        Wrapping a base with ``encode_sound_only=True`` calls it. Call it again after you train the encoder.
        """
        if not hasattr(self, "silence"):
            self.make_silence()
        self.silence.copy_(stored_silence(self.base, STORED))
        self.config.encode_sound_only = True
        return self


def check_silence_is_stored(model: PreTrainedModel) -> None:
    """Raise ValueError if ``encode_sound_only`` was set since a model was made, which so has no stored silence."""
    if model.config.encode_sound_only and not hasattr(model, "silence"):
        raise ValueError(
            "encode_sound_only was set in the configuration, but this model has no stored silence. Call "
            "model.store_silence(), which sets it too, or set it to False."
        )


def check_encoder(encoder: nn.Module, drops: bool) -> None:
    """Raise ValueError unless the encoder's window can be cut, and its layers drop no vectors."""
    if not isinstance(encoder, WhisperEncoder):
        raise ValueError(
            f"encode_sound_only is for Whisper, whose encoder always runs over a window of the same length, but the "
            f"encoder is a {type(encoder).__name__}. Leave it off: other encoders mask their padding."
        )
    if drops:
        raise ValueError(
            "encode_sound_only does not work with an encoder whose layers drop vectors, because what they drop of "
            "silence would be missing from the stored vectors. Leave the encoder out of attentions, or "
            "encode_sound_only off."
        )


def mark_unheard(features: Tensor, frames: Tensor) -> Tensor:
    """Features ``(B, mels, T)`` with NaN after the first ``frames`` ``(B,)`` of each example.

    So each example carries its length, whichever examples of a batch Whisper's ``generate()`` goes on with.
    """
    after = torch.arange(features.shape[-1], device=features.device) >= frames.to(features.device)[:, None]
    return features.masked_fill(after[:, None], math.nan)


def mark_end(segment: Tensor, frames: Tensor, given: Tensor, silence: Tensor) -> Tensor:
    """A window ``(B, mels, T)`` with ``frames`` ``(B,)`` of sound, and a margin after it, marked with NaN after that.

    Only the first ``given`` ``(B,)`` frames are of the input: Whisper pads with zeros, which are not ``silence``
    ``(B,)``.
    """
    end = frames.to(segment.device) + STRIDE * MARGIN
    padding = torch.arange(segment.shape[-1], device=segment.device) >= given.to(segment.device)[:, None]
    filled = torch.where(padding[:, None], silence.to(segment)[:, None, None], segment)
    return mark_unheard(filled, end)


def silence_of(features: Tensor) -> Tensor:
    """The value that silence has in the features ``(B, mels, T)`` of each recording, ``(B,)``.

    Whisper's extractor lifts every value to ``SPAN`` below the loudest of the recording. NaN does not count.
    """
    loudest = features.nan_to_num(-math.inf).amax((1, 2))
    return (loudest - SPAN).clamp(min=NO_SOUND)  # also where there is no sound at all


def heard_frames(features: Tensor, attention_mask: Tensor | None) -> Tensor:
    """How many frames of features ``(B, mels, T)`` to encode, ``(B,)``: none marked, within the mask and a margin.

    Raises:
        ValueError: the mask is no tensor of 0 and 1, or has another shape than ``(B, T)``.
    """
    frames = end_of(mask_of_marks(features))
    if attention_mask is None:
        return frames
    is_tensor = isinstance(attention_mask, Tensor)
    if not is_tensor or ((attention_mask != 0) & (attention_mask != 1)).any():
        what = "holds other values" if is_tensor else f"is a {type(attention_mask).__name__}"
        raise ValueError(
            f"attention_mask must be a tensor, 1 where there is sound and 0 elsewhere, but {what}. Pass what the "
            'processor returned: processor(..., return_tensors="pt", return_attention_mask=True).'
        )
    if attention_mask.shape != features[:, 0].shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but the features {tuple(features.shape)} need "
            f"{tuple(features[:, 0].shape)}. Pass the mask that the processor returned with them, one value a frame."
        )
    end = end_of(attention_mask)
    return torch.maximum(torch.minimum(end + STRIDE * MARGIN, frames), end)  # NaN within the sound is no mark


def end_of(attention_mask: Tensor) -> Tensor:
    """How many frames there are up to the last one of the sound that a mask ``(B, T)`` shows, ``(B,)``."""
    place = torch.arange(1, attention_mask.shape[-1] + 1, device=attention_mask.device)
    return (attention_mask.bool() * place).amax(-1)


def mask_of_marks(features: Tensor) -> Tensor:
    """A mask ``(B, T)`` that says the same as the marks (:func:`mark_unheard`) of features ``(B, mels, T)``."""
    return (~features.isnan().all(1)).long()


def warn_without_mask(features: Tensor) -> None:
    """Warn once that nothing tells the length of the sound, unless the features are marked with it."""
    if not torch.compiler.is_compiling() and not features.isnan().any():
        logger.warning_once(
            "encode_sound_only has no attention_mask, so the encoder runs over the whole window, its silence too. Ask "
            "the processor for the mask: processor(..., return_attention_mask=True), and pass it on. For windows "
            "without silence pass a mask of ones."
        )


def hear(base: PreTrainedModel, inputs: dict, silence: Tensor, stacked: bool = False) -> Heard:
    """Run the encoder over the sound of ``input_features``, and add ``silence`` ``(K, H)`` with the mass of the rest.

    Examples do not depend on each other: no attention sees what comes after a shorter sound and its margin.

    Args:
        inputs: the encoder's inputs, by name. Frames whose mask is 0 after all others are not encoded.
        stacked: whether the encoder's layers pass on what they merge.
    """
    check_not_exporting("encode_sound_only", "Export with model.config.encode_sound_only = False.")
    encoder = base.get_encoder()
    features, window = inputs["input_features"], encoder.config.max_source_positions
    if features.shape[-1] != STRIDE * window:
        run_encoder(base, inputs)  # its error says what it needs
    if inputs.get("attention_mask") is None:
        warn_without_mask(features)
    frames = heard_frames(features, inputs.get("attention_mask"))
    numbers = vectors_of(frames, window)
    longest = int(numbers.max())
    others = {name: value for name, value in inputs.items() if name not in ("input_features", "attention_mask")}
    # Zeros after each example's own end, as after the end of the longest.
    after = torch.arange(STRIDE * longest, device=features.device) >= STRIDE * numbers[:, None]
    unheard = (torch.arange(features.shape[-1], device=features.device) >= frames[:, None])[:, None]
    features = torch.where(unheard & features.isnan(), silence_of(features)[:, None, None], features)
    features = features[:, :, : STRIDE * longest].masked_fill(after[:, None], 0)
    padding = torch.arange(longest, device=features.device) >= numbers[:, None]
    cut = cut_encoder(encoder, longest, padding if (numbers < longest).any() else None)
    outputs, _ = run_encoder(base, {"input_features": features, **others}, cut)
    vectors = outputs.last_hidden_state
    left = left_by_layers(vectors) if stacked else None
    padding, log_mass = (padding, None) if left is None else (~left.keep, left.log_mass)
    return with_rest(outputs, numbers, padding, log_mass, silence, window)


def vectors_of(frames: Tensor, window: int) -> Tensor:
    """How many vectors of ``frames`` ``(B,)`` of sound to encode, ``(B,)``: of no sound those of a margin."""
    return (-(-frames // STRIDE)).clamp(min=min(MARGIN, window))


def heard_before(base: PreTrainedModel, states: Tensor, attention_mask: Tensor | None, silence: Tensor) -> Heard:
    """What :func:`hear` returned when the encoder made ``states`` ``(B, Ns, H)`` in an earlier call.

    Args:
        attention_mask: of the features then, ``(B, T)``, or of the states, ``(B, Ns)``.

    Raises:
        ValueError: there is no mask, and the states are not whole windows; the mask does not fit the states.
    """
    window, shape = base.get_encoder().config.max_source_positions, tuple(states.shape[:2])
    if attention_mask is None:
        if shape[1] < window:
            raise ValueError(
                f"encoder_last_hidden_state has {shape[1]} vectors for a window of {window}, and nothing tells which "
                "of them are of the sound. Pass the attention_mask that the encoder had, too."
            )
        numbers = torch.full(shape[:1], window, device=states.device)
    elif tuple(attention_mask.shape) == shape:
        numbers = end_of(attention_mask)
    elif tuple(attention_mask.shape) == (shape[0], STRIDE * window):
        end = end_of(attention_mask) + STRIDE * MARGIN
        numbers = vectors_of(end.clamp(max=STRIDE * window), window)
    else:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but encoder_last_hidden_state of {shape} needs "
            f"{shape}, or {(shape[0], STRIDE * window)} as the features had it."
        )
    if (numbers > shape[1]).any():
        raise ValueError(
            f"attention_mask shows sound of up to {int(numbers.max())} vectors with its margin, but "
            f"encoder_last_hidden_state has {shape[1]}. Pass the mask that the encoder had."
        )
    padding = torch.arange(shape[1], device=states.device) >= numbers[:, None]
    of_encoder = BaseModelOutput(last_hidden_state=states)
    return with_rest(of_encoder, numbers, padding, None, silence, window)


def with_rest(
    outputs: BaseModelOutput,
    numbers: Tensor,
    padding: Tensor,
    log_mass: Tensor | None,
    silence: Tensor,
    window: int,
) -> Heard:
    """The encoder's vectors, and ``silence`` ``(K, H)`` with the mass of what is left of each window.

    Args:
        numbers: how many vectors of each window were encoded, before any were merged, ``(B,)``.
    """
    vectors = outputs.last_hidden_state
    if (numbers == window).all():
        return Heard(outputs, vectors, padding if padding.any() else None, log_mass, None, window)
    if log_mass is None:
        log_mass = vectors.new_zeros(vectors.shape[:2])
    stored = silence.shape[0]
    rest = (window - numbers)[:, None].expand(-1, stored)
    return Heard(
        outputs,
        torch.cat([vectors, silence.to(vectors.dtype).expand(vectors.shape[0], -1, -1)], dim=1),
        torch.cat([padding, rest == 0], dim=1),
        torch.cat([log_mass, (rest.clamp(min=1) / stored).log()], dim=1),
        (rest > 0).sum(-1),
        window,
    )


def cut_encoder(encoder: WhisperEncoder, length: int, padding: Tensor | None) -> WhisperEncoder:
    """A Whisper encoder with the same parameters and a window of ``length`` vectors. ``encoder`` does not change.

    Args:
        padding: ``(B, length)``, True where no attention sees.
    """
    if length == encoder.config.max_source_positions and padding is None:
        return encoder
    cut = copy.copy(encoder)
    cut._modules = dict(encoder._modules)
    cut.config = copy.copy(encoder.config)
    cut.config.max_source_positions = length
    cut._modules["embed_positions"] = copy.copy(encoder.embed_positions)
    cut.embed_positions.num_embeddings = length
    if padding is not None:
        width = encoder.config.d_model
        states = encoder.conv1.weight.new_zeros(1).expand(*padding.shape, width)
        mask = create_bidirectional_mask(config=encoder.config, inputs_embeds=states, attention_mask=~padding)
        # The loop over the layers finds these in vars(). The modules themselves do not change.
        vars(cut)["layers"] = [partial(run_layer, layer, mask) for layer in encoder.layers]
    return cut


def run_layer(layer: nn.Module, mask: Tensor, hidden_states: Tensor, attention_mask: None = None, **kwargs):
    """Run a layer with a mask that its encoder does not pass."""
    return layer(hidden_states, mask, **kwargs)


@torch.no_grad()
def stored_silence(base: PreTrainedModel, number: int) -> Tensor:
    """``(number, H)``: encodes a window of silence, cuts it into equal pieces, and takes each piece's mean.

    A merged vector counts in each place of those that it replaces.
    """
    encoder = base.get_encoder()
    frames = STRIDE * encoder.config.max_source_positions
    features = encoder.conv1.weight.new_full((1, encoder.config.num_mel_bins, frames), BESIDE_SPEECH)
    training = encoder.training
    encoder.eval()
    with ForwardPass() as this_pass:
        states = encoder(features).last_hidden_state[0]
    encoder.train(training)
    if (left := this_pass.left) is not None and left.log_mass is not None:  # in the order of the first in each
        counts = left.log_mass[0].exp().round().long() * left.keep[0]
        states = states.repeat_interleave(counts, dim=0)
    return torch.stack([piece.mean(0) for piece in states.tensor_split(number)])
