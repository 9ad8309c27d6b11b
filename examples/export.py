"""Export a wrapped model to ONNX and write text with onnxruntime: encoder, decoder, and decoder with a cache.

    pip install onnx onnxscript onnxruntime
    python examples/export.py                    # a tiny BART with random weights, a minute or more on two CPU cores
    python examples/export.py FOLDER   # a saved model that reads text

The three graphs take batches and texts of any size. Two numbers say whether they do what the model does.
"""

import sys

import onnxruntime
import torch
from torch import nn
from torch.export import Dim
from transformers import BartConfig, BartForConditionalGeneration, EncoderDecoderCache

from nvib_hf import NvibForConditionalGeneration, NvibLatents

torch.manual_seed(0)
if len(sys.argv) > 1:
    model = NvibForConditionalGeneration.from_pretrained(sys.argv[1])
else:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=99, init_std=0.3, forced_eos_token_id=None, **sizes, **heads, **ids)
    bart = BartForConditionalGeneration(config)
    model = NvibForConditionalGeneration.from_base_pretrained(bart, tau_alpha=1.0, tau_sigma=0.3)


class Encoder(nn.Module):
    """Tokens to all that a decoder reads of their latents."""

    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        latents = self.model.encode(input_ids=input_ids, attention_mask=attention_mask)
        return latents.z, latents.logvar, latents.log_pi


class Decoder(nn.Module):
    """Logits and a cache, four tensors a layer: of tokens, latents and the cache of the tokens before them, if any."""

    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, tokens, z, logvar, log_pi, cached=()):
        cache = EncoderDecoderCache([cached[i : i + 4] for i in range(0, len(cached), 4)])
        latents = NvibLatents(z, log_pi, attention_mask=log_pi > -torch.inf, logvar=logvar)
        logits = self.model(encoder_outputs=latents, decoder_input_ids=tokens, cache=cache, use_cache=True).logits
        layers = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        return logits, *(x for own, cross in layers for x in (own.keys, own.values, cross.keys, cross.values))


def export(module, inputs, lengths, path):
    """Write a graph and run it: ``lengths`` say which size of an input is a length, beside the batch, its first."""
    names = [f"input_{i}" for i in range(len(inputs))]
    shapes = [{0: Dim.DYNAMIC} if length is None else {0: Dim.DYNAMIC, length: Dim.DYNAMIC} for length in lengths]
    if cached := tuple(inputs[4:]):  # of the decoder, a tuple by itself
        inputs, shapes = (*inputs[:4], cached), [*shapes[:4], tuple(shapes[4:])]
    module.eval()  # in whose mode the exporter leaves the model
    torch.onnx.export(
        module, tuple(inputs), path, dynamo=True, input_names=names, dynamic_shapes=tuple(shapes), verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    read = {one.name for one in session.get_inputs()}  # a cache has the keys of the latents already

    def run(*inputs):
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True) if name in read}
        return [torch.from_numpy(x) for x in session.run(None, given)]

    return run


def texts(batch, length):
    """Random tokens, the last text two shorter than the others, and their mask."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return torch.randint(3, model.config.base_config.vocab_size, (batch, length)) * mask, mask


# Sizes to export with. None of them is 1, which an exporter would take for a fixed size, but for a step's one token.
with torch.no_grad():
    source, tokens = texts(batch=2, length=7), texts(batch=2, length=5)[0]
    latents = Encoder().eval()(*source)
    _, *cached = Decoder().eval()(tokens, *latents)
    encode = export(Encoder(), source, [1, 1], "encoder.onnx")
    decode = export(Decoder(), [tokens, *latents], [1] * 4, "decoder.onnx")
    go_on = export(
        Decoder(), [tokens[:, :1], *latents, *cached], [None, 1, 1, 1] + [2] * len(cached), "decoder_with_cache.onnx"
    )

# Other sizes to write with, greedily.
source, config, steps = texts(batch=5, length=11), model.generation_config, 12
config.eos_token_id = config.forced_eos_token_id = None  # all texts to the same length
latents = encode(*source)
written = torch.full((5, 1), config.decoder_start_token_id)
logits, *cached = decode(written, *latents)
every = [logits]
while written.shape[1] <= steps:
    written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
    logits, *cached = go_on(written[:, -1:], *latents, *cached)
    every.append(logits)

with torch.no_grad():
    expected = model(input_ids=source[0], attention_mask=source[1], decoder_input_ids=written).logits
greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": steps}
generated = model.generate(input_ids=source[0], attention_mask=source[1], **greedy)
print(f"largest difference of a logit: {(torch.cat(every, dim=1) - expected).abs().max():.1e}")
print(f"tokens that generate() writes too: {(written == generated).float().mean():.0%} of {generated.numel()}")
