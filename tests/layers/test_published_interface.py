"""The walk-through of the published package ``nvib``, with the shapes that its README documents; and weights without
their trailing dimension, which are taken as well."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nvib_hf import DenoisingMultiheadAttention, Nvib, kl_dirichlet, kl_gaussian
from nvib_hf.layers.published import as_memory

NS, NT, B, H, P = 7, 5, 3, 12, 8
BY_VECTOR = ("pi", "alpha", "log_alpha")


def make_decoder(heads: int, bias: bool, layers: int = 2, width: int = P, batch_first: bool = False):
    layer = nn.TransformerDecoderLayer(width, heads, dim_feedforward=16, batch_first=batch_first)
    decoder = nn.TransformerDecoder(layer, num_layers=layers)
    for each in decoder.layers:
        each.multihead_attn = DenoisingMultiheadAttention(
            embed_dim=width, num_heads=heads, dropout=0.1, bias=bias, batch_first=batch_first
        )
    return decoder


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kappa", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_the_walk_through(training, kappa, heads, bias):
    layer = Nvib(size_in=H, size_out=P, prior_mu=0, prior_var=1, prior_alpha=1, delta=1, kappa=kappa).train(training)
    decoder = make_decoder(heads, bias).train(training)
    src_key_padding_mask = torch.zeros(B, NS, dtype=torch.bool)
    src_key_padding_mask[1, 4:] = True
    nl = (NS + 1) * (kappa if training else 1)  # evaluation: one vector a component

    latent = layer(torch.randn(NS, B, H), src_key_padding_mask)
    z, pi, mu, logvar = latent["z"]
    assert isinstance(latent, dict) and isinstance(latent["z"], tuple)
    assert z.shape == mu.shape == logvar.shape == latent["mu"].shape == latent["logvar"].shape == (nl, B, P)
    assert pi.shape == latent["z"].log_pi.shape == (nl, B, 1)
    assert all(latent[name].shape == (nl, B, 1) for name in BY_VECTOR)
    assert latent["memory_key_padding_mask"].shape == (B, nl)
    assert all(latent[f"avg_{name}"].shape == () for name in ("num_vec", "prop_vec", "alpha0"))

    target, causal = torch.randn(NT, B, P), nn.Transformer.generate_square_subsequent_mask(NT)
    masks = {"tgt_mask": causal, "memory_key_padding_mask": latent["memory_key_padding_mask"]}
    output = decoder(target, latent["z"], **masks)
    assert output.shape == (NT, B, P)
    kl_g, kl_d = layer.kl_gaussian(**latent), layer.kl_dirichlet(**latent)
    assert kl_g.shape == kl_d.shape == (B,)
    (output.sum() + kl_g.sum() + kl_d.sum()).backward()
    assert all(p.grad.isfinite().all() for p in [*layer.parameters(), *decoder.parameters()])

    number_samples, mask = 4, torch.zeros(4, 6, dtype=torch.bool)
    mask[2, 1:] = True
    memory = layer.sample(number_samples, mask, "cpu")
    assert [tuple(x.shape) for x in memory] == [(6, 4, P), (6, 4, 1), (6, 4, P), (6, 4, P)]
    assert decoder(torch.randn(NT, 4, P), memory, memory_key_padding_mask=mask).shape == (NT, 4, P)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("ns, batch, width", [(7, 3, 8), (7, 1, 8), (0, 3, 8), (0, 1, 8), (2, 3, 1), (0, 1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_weights_without_their_trailing_dimension(training, ns, batch, width, batch_first):
    """Told by the number of dimensions: a batch of one, one vector (no source) or a width of one are not it."""
    layer = Nvib(width, width, prior_alpha=0.7, delta=0.5, batch_first=batch_first, prior_mu=0.5).train(training)
    attention = DenoisingMultiheadAttention(width, 1, batch_first=batch_first).eval()
    latent = layer(torch.randn((batch, ns, width) if batch_first else (ns, batch, width)))
    query = torch.randn((batch, 2, width) if batch_first else (2, batch, width))
    assert latent["pi"].shape == ((batch, ns + 1, 1) if batch_first else (ns + 1, batch, 1))

    without = latent | {name: latent[name].squeeze(-1) for name in BY_VECTOR}
    z, pi, mu, logvar = latent["z"]
    plain, short = (z, pi, mu, logvar), (z, pi.squeeze(-1), mu, logvar)
    assert short[1].dim() == 2
    assert_close(as_memory(short).log_pi, as_memory(plain).log_pi, rtol=0, atol=0)
    for need_weights in (True, False):
        expected = attention(query, latent["z"], need_weights=need_weights)[0]
        for memory in (plain, short):
            assert_close(attention(query, memory, need_weights=need_weights)[0], expected)
    for method in (layer.kl_gaussian, layer.kl_dirichlet):
        assert method(**latent).shape == (batch,)
        assert_close(method(**without), method(**latent), rtol=0, atol=0)
    for function in (kl_gaussian, kl_dirichlet):
        for name in ("alpha", "log_alpha"):
            other = {"alpha": None, "log_alpha": None}
            results = [function(**{**form, **other, name: form[name]}) for form in (latent, without)]
            assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["alpha", "log_alpha"])
@pytest.mark.parametrize("shape", [(6,), (6, 3, 2), (6, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("function", [kl_gaussian, kl_dirichlet])
def test_pseudo_counts_of_another_shape_are_refused(function, shape, name):
    with pytest.raises(ValueError, match=rf"^{name} has shape \({shape[0]}.*one number for each vector, \(Nl, B, 1\)"):
        function(mu=torch.zeros(6, 3, 2), logvar=torch.zeros(6, 3, 2), **{name: torch.ones(shape)})
