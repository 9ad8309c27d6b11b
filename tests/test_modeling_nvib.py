"""``NvibForConditionalGeneration``: making one, its latents, its outputs, and the base it shares."""

import copy

import pytest
import torch
from tiny_models import BERT_LIKE, DECODER, GPT2_LIKE, PAD, START, VOCAB_SIZE, tiny_base, tiny_inputs, tiny_labels
from tiny_nvib import cross_attention, tensors, tiny_nvib
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel, GPT2Config, GPT2LMHeadModel

from nvib_hf import NvibConfig, NvibForConditionalGeneration, NvibLatents, concatenate_latents

INF = float("inf")
FAMILIES = ["bart", "t5", "bert2gpt2"]


def wrap(base, **settings):
    return NvibForConditionalGeneration.from_base_pretrained(base, **settings)


def logits(model, family="bart", **inputs):
    """Of an NVIB model or its base."""
    with torch.no_grad():
        return model(**(inputs or tiny_inputs(family)), decoder_input_ids=shifted(tiny_labels(family))).logits


def shifted(labels):
    return F.pad(labels[:, :-1], (1, 0), value=START).masked_fill(F.pad(labels[:, :-1], (1, 0)) == -100, PAD)


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **tolerance)


# ------------------------------------------------------------------------------------------------- latents of texts
@pytest.mark.parametrize("kl_weights", ["drawn", "pseudo_counts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_latents_follow_the_definition(family, kl_weights):
    """Against the formulas, from the encoder's own output."""
    prior = {"prior_mu": 0.1, "prior_var": 0.7, "prior_alpha": 2.0}
    model, inputs = tiny_nvib(family, kl_weights=kl_weights, **prior), tiny_inputs(family)
    with torch.no_grad():
        latents = model.encode(**inputs)
        x = model.get_encoder()(**inputs).last_hidden_state
    mask = inputs["attention_mask"].bool()
    layer = model.nvib
    width = x.shape[-1]
    mu = x @ layer.mu_logvar.weight[:width].T + layer.mu_logvar.bias[:width]
    logvar = x @ layer.mu_logvar.weight[width:].T + layer.mu_logvar.bias[width:]
    log_alpha = x @ layer.alpha_weight + x.square() @ layer.alpha_quadratic + layer.alpha_bias
    for row in range(len(mask)):
        length = int(mask[row].sum())
        own = {name: latents[name][row, 1 : length + 1] for name in ("z", "logvar", "log_alpha")}
        assert_close(own["z"], mu[row, :length])
        assert_close(own["logvar"], logvar[row, :length])
        assert_close(own["log_alpha"], log_alpha[row, :length])
        assert_close(latents.z[row, 0], torch.full((width,), 0.1))
        assert_close(latents.logvar[row, 0].exp(), torch.full((width,), 0.7))
        alpha = torch.cat([torch.tensor([2.0]), log_alpha[row, :length].exp()])
        pi = alpha / alpha.sum()
        assert_close(latents.log_pi[row].exp(), F.pad(pi, (0, mask.shape[1] - length)))
        assert latents.attention_mask[row].tolist() == [True] * (length + 1) + [False] * (mask.shape[1] - length)
        means = torch.cat([torch.full((1, width), 0.1), mu[row, :length]])
        variances = torch.cat([torch.full((1, width), 0.7), logvar[row, :length].exp()])
        terms = variances / 0.7 + (means - 0.1).square() / 0.7 - 1 - (variances / 0.7).log()
        weights = pi if kl_weights == "pseudo_counts" else torch.full_like(pi, 1 / (length + 1))
        assert_close(latents.kl_gaussian[row], 0.5 * (weights * terms.mean(-1)).sum())
        assert_close(latents.num_vectors[row], torch.tensor(float(length)))
        assert_close(latents.effective_vectors[row], torch.exp(-(pi * pi.log()).sum()))
    assert (latents.prop_vectors == 1).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sample", [None, False, True])
def test_encode_follows_the_mode_unless_told(training, sample):
    model = tiny_nvib(kappa=2).train(training)
    latents = model.encode(**tiny_inputs("bart"), sample=sample)
    drawn = training if sample is None else sample
    assert (latents.logvar is None) == drawn
    assert latents.z.shape[1] == (2 if drawn else 1) * 10
    again = model.encode(**tiny_inputs("bart"), sample=sample)
    assert torch.equal(latents.z, again.z) != drawn
    assert model.training == training


def test_generator_determines_the_draws_and_spares_the_global_one():
    model, inputs = tiny_nvib().train(), tiny_inputs("bart")
    torch.manual_seed(0)
    for _ in range(3):
        model.get_encoder()(**inputs)  # which may draw by itself whether to leave a layer out
    state = torch.get_rng_state()
    torch.manual_seed(0)
    first, second, other = (model.encode(**inputs, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.z, second.z) and torch.equal(first.log_pi, second.log_pi)
    assert not torch.equal(first.z, other.z)
    loss = [
        model(**inputs, labels=tiny_labels("bart"), generator=torch.Generator().manual_seed(1)).loss for _ in range(2)
    ]
    assert torch.equal(*loss)


@pytest.mark.parametrize("kappa", [1, 3])
def test_draws_have_the_posterior_s_moments(kappa):
    model = tiny_nvib(kappa=kappa)
    inputs = {name: value[1:2].expand(4000, -1) for name, value in tiny_inputs("bart").items()}
    with torch.no_grad():
        posterior = model.encode(**{name: value[:1] for name, value in inputs.items()})
        drawn = model.encode(**inputs, sample=True, generator=torch.Generator().manual_seed(0))
    weights = drawn.log_pi.exp().unflatten(1, (-1, kappa)).sum(-1)  # a component's vectors stand side by side
    mean = posterior.log_pi[0].exp()
    total = posterior.log_alpha[0].exp().sum()
    variance = mean * (1 - mean) / (total + 1)
    assert_close(weights.mean(0), mean, rtol=0, atol=float(4 * (variance / 4000).sqrt().max()))
    assert_close(weights.var(0), variance, rtol=0.2, atol=1e-6)
    kept = posterior.attention_mask[0]
    z = drawn.z.unflatten(1, (-1, kappa))
    spread = posterior.logvar[0].exp().sqrt()[:, None]
    error = ((z.mean(0) - posterior.z[0][:, None]) / spread)[kept].abs().max() * 4000**0.5
    assert error < 5  # standard errors, the largest of some hundreds
    assert_close((z.std(0) / spread)[kept], torch.ones_like(z[0][kept]), rtol=0, atol=0.06)
    assert (drawn.z[:, kappa * int(kept.sum()) :] == 0).all()


def test_repeats_of_a_component_count_in_training_alone():
    once, thrice = tiny_nvib(kappa=1), tiny_nvib(kappa=3)
    inputs = tiny_inputs("bart")
    with torch.no_grad():
        expected, evaluated = once.encode(**inputs), thrice.encode(**inputs)
        sampled = [model.encode(**inputs, sample=True) for model in (once, thrice)]
    for name in ("z", "kl_gaussian", "kl_dirichlet", "num_vectors"):
        assert torch.equal(evaluated[name], expected[name]), name
    assert_close(sampled[0].kl_gaussian, expected.kl_gaussian)
    assert_close(sampled[1].kl_gaussian, 3 * expected.kl_gaussian)  # k0 / n' = kappa, and alpha_i / kappa three times
    assert not torch.allclose(sampled[1].kl_dirichlet, expected.kl_dirichlet)
    assert torch.equal(sampled[1].num_vectors, expected.num_vectors)


def test_padding_does_not_change_latents():
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    with torch.no_grad():
        together = model.encode(**inputs)
        for row, length in enumerate(inputs["attention_mask"].sum(-1).tolist()):
            alone = model.encode(input_ids=inputs["input_ids"][row : row + 1, :length])
            cut = together[row]
            for name in ("z", "log_pi", "logvar", "log_alpha"):
                assert_close(cut[name][:, : length + 1], alone[name], msg=lambda text, name=name: f"{name}: {text}")
            for name in ("kl_gaussian", "kl_dirichlet", "num_vectors", "effective_vectors"):
                assert_close(cut[name], alone[name])


def test_encode_takes_what_the_tokenizer_gave_with_labels():
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    assert torch.equal(model.encode(**inputs, labels=tiny_labels("bart")).z, model.encode(**inputs).z)


# ---------------------------------------------------------------------------------------------- latents of the prior
def test_samples_have_the_lengths_asked_for():
    model = tiny_nvib()
    latents = model.sample_latents(3, [4, 1, 2])
    assert latents.attention_mask.sum(-1).tolist() == [4, 1, 2]
    assert (latents.log_pi > -INF).sum(-1).tolist() == [4, 1, 2]
    assert_close(latents.log_pi.exp().sum(-1), torch.ones(3))
    assert latents.logvar is None and latents.kl_gaussian is None
    assert model.sample_latents(3, 4).attention_mask.tolist() == [[True] * 4] * 3
    assert model.sample_latents(2, torch.tensor([2, 3])).z.shape == (2, 3, 32)


def test_samples_have_the_prior_s_moments():
    mu, variance = torch.linspace(-1, 1, 32), torch.linspace(0.2, 2, 32)
    model = tiny_nvib(prior_mu=mu.tolist(), prior_var=variance.tolist(), prior_alpha=3.0, delta=0.5)
    count, n = 6000, 5
    latents = model.sample_latents(count, n, generator=torch.Generator().manual_seed(0))
    z, weights = latents.z.flatten(0, 1), latents.log_pi.exp()
    assert ((z.mean(0) - mu) / (variance / len(z)).sqrt()).abs().max() < 4.5
    assert_close(z.var(0), variance, rtol=0.05, atol=0)
    # Dirichlet of n equal parameters whose sum is prior_alpha + delta * (n - 1)
    expected = (1 / n) * (1 - 1 / n) / (3.0 + 0.5 * (n - 1) + 1)
    assert_close(weights.mean(0), torch.full((n,), 1 / n), rtol=0, atol=4 * (expected / count) ** 0.5)
    assert_close(weights.var(0), torch.full((n,), expected), rtol=0.08, atol=0)


def test_samples_follow_their_generator():
    model = tiny_nvib()
    state = torch.get_rng_state()
    a, b, c = (model.sample_latents(2, 3, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a.z, b.z) and torch.equal(a.log_pi, b.log_pi) and not torch.equal(a.z, c.z)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_decode_alike_in_training_and_evaluation(family):
    model = tiny_nvib(family)
    latents = model.sample_latents(3, [3, 5, 2])
    labels = tiny_labels(family)
    with torch.no_grad():
        in_evaluation = model.eval()(encoder_outputs=latents, labels=labels)
        in_training = model.train()(encoder_outputs=latents, labels=labels)
    assert_close(in_training.logits, in_evaluation.logits)
    assert in_evaluation.kl_gaussian is None
    assert torch.equal(in_evaluation.loss, in_evaluation.cross_entropy)  # nothing to weigh against a prior


# ------------------------------------------------------------------------------------------------------ interpolation
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sample", [False, True], ids=["posterior", "sample"])
def test_interpolation_ends_at_the_ends(family, sample):
    model, labels = tiny_nvib(family), tiny_labels(family)
    long, short = tiny_inputs(family), {k: v[:, :5] for k, v in tiny_inputs(family, seed=1).items()}
    with torch.no_grad():
        a, b = (model.encode(**x, sample=sample) for x in (long, short))
        assert a.z.shape != b.z.shape
        ends = [model(encoder_outputs=x, labels=labels).logits for x in (a, b)]
        for weight, end in zip((0, 1), ends, strict=True):
            between = model.interpolate_latents(a, b, weight)
            assert_close(model(encoder_outputs=between, labels=labels).logits, end)
        mixed = model(encoder_outputs=model.interpolate_latents(a, b, torch.tensor([0.0, 1.0, 0.5])), labels=labels)
        halfway = model(encoder_outputs=model.interpolate_latents(a, b, 0.5), labels=labels)
        assert_close(mixed.logits[0], ends[0][0])
        assert_close(mixed.logits[1], ends[1][1])
        assert_close(mixed.logits[2], halfway.logits[2])
        assert (halfway.logits - ends[0]).abs().max() > 0.1 < (halfway.logits - ends[1]).abs().max()


def test_interpolation_with_itself_is_itself():
    """Half the mass twice at each place is the whole mass once."""
    model = tiny_nvib()
    with torch.no_grad():
        latents = model.encode(**tiny_inputs("bart"))
        between = model.interpolate_latents(latents, latents, 0.3)
        assert_close(
            model(encoder_outputs=between, labels=tiny_labels("bart")).logits, logits(model), rtol=1e-4, atol=1e-5
        )


def test_interpolation_of_a_text_with_a_sample():
    model, labels = tiny_nvib(), tiny_labels("bart")
    with torch.no_grad():
        text, drawn = model.encode(**tiny_inputs("bart")), model.sample_latents(3, 4)
        for weight, end in ((0, text), (1, drawn)):
            between = model.interpolate_latents(text, drawn, weight)
            assert_close(
                model(encoder_outputs=between, labels=labels).logits,
                model(encoder_outputs=end, labels=labels).logits,
                rtol=1e-4,
                atol=1e-5,
            )


# ------------------------------------------------------------------------------------------------------------ batches
@pytest.mark.parametrize("family", FAMILIES)
def test_latents_decode_the_same_in_any_batch(family):
    model, labels = tiny_nvib(family), tiny_labels(family)
    with torch.no_grad():
        latents = model.encode(**tiny_inputs(family))
        whole = model(encoder_outputs=latents, labels=labels).logits
        assert_close(whole, logits(model, family))
        for row in range(3):
            alone = model(encoder_outputs=latents[row], labels=labels[row : row + 1]).logits
            assert_close(alone[0], whole[row])
        joined = concatenate_latents([latents[2].compact(), latents[:2]])
        assert_close(model(encoder_outputs=joined, labels=labels[[2, 0, 1]]).logits, whole[[2, 0, 1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_by_the_means_and_by_the_mixture(family):
    """The means are points scored ``s/2 sum sigma^2`` lower, whichever way a latent comes to the decoder."""
    means, mixture = (tiny_nvib(family, evaluation=kind, tau_sigma=1.5) for kind in ("means", "mixture"))
    latents = means.encode(**tiny_inputs(family))
    log_pi = (latents.log_pi - 0.5 * means.scale * latents.logvar.exp().sum(-1)).log_softmax(-1)
    points = NvibLatents(z=latents.z, log_pi=log_pi, attention_mask=latents.attention_mask)
    expected = logits(mixture, family, encoder_outputs=points)
    assert_close(logits(means, family), expected, rtol=1e-4, atol=1e-4)
    for given in (latents, concatenate_latents([latents[:1], latents[1:]]), latents.compact()):
        assert_close(logits(means, family, encoder_outputs=given), expected, rtol=1e-4, atol=1e-4)
    assert (logits(mixture, family) - expected).abs().max() > 0.01
    exact = NvibLatents(**{**latents, "logvar": torch.full_like(latents.logvar, -INF)})
    assert_close(logits(means, family, encoder_outputs=exact), logits(mixture, family, encoder_outputs=exact))


@pytest.mark.parametrize("family", FAMILIES)
def test_compact_latents_give_the_same_logits(family):
    model, labels = tiny_nvib(family, alpha_threshold=1e-3), tiny_labels(family)
    with torch.no_grad():
        log_alpha = model.encode(**tiny_inputs(family)).log_alpha
        # A threshold between the pseudo-counts: some vectors are dropped in each text.
        model.nvib.alpha_threshold = float(log_alpha[log_alpha > -INF].quantile(0.7).exp())
        latents = model.encode(**tiny_inputs(family))
        compact = latents.compact()
        assert compact.z.shape[1] < latents.z.shape[1]
        assert (latents.num_vectors < tiny_inputs(family)["attention_mask"].sum(-1)).any()
        a, b = (model(encoder_outputs=x, labels=labels).logits for x in (latents, compact))
    assert_close(a, b)


# ------------------------------------------------------------------------------------------------------------ outputs
@pytest.mark.parametrize("training", [True, False])
def test_loss_is_the_cross_entropy_and_the_weighted_divergences(training):
    """In evaluation the moving weights count as 1, so that its losses compare over a training."""
    model = tiny_nvib(lambda_gaussian=0.3, lambda_dirichlet=0.2).train(training)
    inputs, labels = tiny_inputs("bart"), tiny_labels("bart")
    model.kl_beta.copy_(torch.tensor([0.5, 0.25, 1.0]))
    with torch.no_grad():
        outputs = model(**inputs, labels=labels, generator=torch.Generator().manual_seed(0))
    nll = F.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none")
    tokens = (labels != -100).sum(-1)
    gaussian, dirichlet = (0.5, 0.25) if training else (1, 1)
    kl = gaussian * 0.3 * outputs.kl_gaussian + dirichlet * 0.2 * outputs.kl_dirichlet
    assert_close(outputs.cross_entropy, nll.sum() / tokens.sum())
    assert_close(outputs.loss, (nll.sum() + (tokens * kl).sum()) / tokens.sum())
    with torch.no_grad():
        again = {"generator": torch.Generator().manual_seed(0)}
        scaled = model(**inputs, labels=labels, num_items_in_batch=100, **again)
    assert_close(scaled.loss, (nll.sum() + (tokens * kl).sum()) / 100)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_without_labels(family):
    model, inputs = tiny_nvib(family), tiny_inputs(family)
    labels = tiny_labels(family)
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels)
    with torch.no_grad():
        outputs = model(**inputs, decoder_input_ids=decoder_input_ids)
        assert outputs.loss is None and outputs.cross_entropy is None
        assert outputs.kl_gaussian.shape == outputs.kl_dirichlet.shape == (3,)
        assert_close(outputs.logits, logits(model, family))
        embeddings = model.get_decoder().get_input_embeddings()(decoder_input_ids)
        if family != "bart":  # which scales inside the embedding; T5 and GPT-2 do not
            embedded = model(**inputs, decoder_inputs_embeds=embeddings)
            assert_close(embedded.logits, outputs.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_states_and_attentions(family, tmp_path):
    tiny_nvib(family).save_pretrained(tmp_path)
    model = NvibForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    inputs, labels = tiny_inputs(family), tiny_labels(family)
    with torch.no_grad():
        outputs = model(**inputs, labels=labels, output_attentions=True, output_hidden_states=True)
        plain = logits(model, family)
    assert_close(outputs.logits, plain)
    layers, source, target, heads = 2, 9, 6, 4
    assert [x.shape for x in outputs.cross_attentions] == [(3, heads, target, source + 1)] * layers
    assert [x.shape for x in outputs.decoder_attentions] == [(3, heads, target, target)] * layers
    assert [x.shape for x in outputs.encoder_attentions] == [(3, heads, source, source)] * layers
    assert [len(x) for x in (outputs.decoder_hidden_states, outputs.encoder_hidden_states)] == [layers + 1] * 2
    weights = torch.stack(outputs.cross_attentions)
    assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    padded = ~outputs.latents.attention_mask
    assert (weights.transpose(0, 1).movedim(-1, 1)[padded] == 0).all() and padded.any()
    assert_close(outputs.encoder_hidden_states[-1], outputs.encoder_last_hidden_state)
    with torch.no_grad():
        assert_close(tiny_base(family).get_encoder()(**inputs).last_hidden_state, outputs.encoder_last_hidden_state)


def test_tuple_output():
    model, inputs, labels = tiny_nvib(), tiny_inputs("bart"), tiny_labels("bart")
    with torch.no_grad():
        as_dict, as_tuple = model(**inputs, labels=labels), model(**inputs, labels=labels, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(as_dict.to_tuple())
    assert torch.equal(as_tuple[0], as_dict.loss) and torch.equal(as_tuple[1], as_dict.logits)


# ------------------------------------------------------------------------------------------------------ making a model
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bart", "t5", "bert2bert", "bert2gpt2"])
def test_the_causal_mask_survives_every_way_to_a_model(family, implementation, tmp_path):
    """Logits must not see later tokens: a reset attention implementation drops the mask without a word."""
    inputs = tiny_inputs(family)
    ids = tiny_labels(family).clamp(min=3)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 7) % VOCAB_SIZE

    def assert_causal(model):
        with torch.no_grad():
            a, b = (model(**inputs, decoder_input_ids=x).logits for x in (ids, changed))
        assert_close(a[:, :-1], b[:, :-1], rtol=0, atol=2e-5)
        assert (a[:, -1] - b[:, -1]).abs().max() > 1e-3

    base = tiny_base(family)
    base.set_attn_implementation(implementation)
    NvibConfig(base_config=base.config)
    assert base.config._attn_implementation == implementation
    assert_causal(base)
    model = wrap(base)
    assert_causal(model)
    NvibConfig(base_config=model.config.base_config)
    copy.deepcopy(model.config)
    assert_causal(model)
    model.save_pretrained(tmp_path)
    assert_causal(NvibForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation))
    assert_causal(model.unwrap())


@pytest.mark.parametrize("family", ["bart", "t5", "bert2bert", "bert2gpt2"])
def test_wrapping_leaves_the_base_s_configuration(family):
    base = tiny_base(family)
    config, before = base.config, copy.deepcopy(base.config.to_dict())
    model = wrap(base, kappa=2)
    assert base.config is config and config.to_dict() == before
    assert model.config.base_config is config  # one and the same: a change on either side is seen on the other


def test_wrapping_draws_no_weights_anew():
    """Modules that were put into the base after it was made do not carry the flag that saves them."""
    base = tiny_base("bart", tie_word_embeddings=False)
    base.lm_head = nn.Linear(32, VOCAB_SIZE, bias=False)
    base.model.decoder.layers[1].encoder_attn.k_proj = nn.Linear(32, 32)
    before = {name: value.clone() for name, value in tensors(base).items()}
    random_state = torch.get_rng_state()
    model = wrap(base)
    for name, value in before.items():
        assert torch.equal(tensors(model.base)[name], value), name
    assert torch.equal(torch.get_rng_state(), random_state)  # nor for the layer, whose weights are the identity


@pytest.mark.parametrize("family", ["bart", "t5", "bert2bert", "bert2gpt2"])
def test_from_a_path_and_from_a_model(family, tmp_path):
    tiny_base(family).save_pretrained(tmp_path)
    from_path, from_model = wrap(str(tmp_path), tau_alpha=3.0).eval(), wrap(tiny_base(family), tau_alpha=3.0)
    for name, value in tensors(from_model).items():
        assert torch.equal(tensors(from_path)[name], value), name
    assert torch.equal(logits(from_path, family), logits(from_model, family))


def test_mode_and_dtype_are_the_base_s():
    assert wrap(tiny_base("bart").train()).training
    model = wrap(tiny_base("bart").to(torch.bfloat16))
    assert not model.training and model.dtype == torch.bfloat16
    assert model.nvib.mu_logvar.weight.dtype == torch.bfloat16
    assert model.nvib.alpha_quadratic.dtype == model.nvib.prior_logvar.dtype == torch.float32


def test_a_fresh_model_of_a_configuration():
    config = NvibConfig(base_config=tiny_base("t5").config, prior_var=0.5, prior_alpha=2.0)
    model = NvibForConditionalGeneration(config)
    assert all(value.isfinite().all() for value in tensors(model).values())
    assert_close(model.nvib.prior_logvar.exp(), torch.full((32,), 0.5))
    assert_close(model.nvib.prior_log_alpha.exp(), torch.tensor([2.0]))
    assert torch.equal(model.nvib.mu_logvar.weight[:32], torch.eye(32))
    assert model(**tiny_inputs("t5"), labels=tiny_labels("t5")).loss.isfinite()


def test_joining_an_encoder_and_a_decoder(tmp_path):
    encoder, decoder = BertModel(BertConfig(**BERT_LIKE)), GPT2LMHeadModel(GPT2Config(**GPT2_LIKE, **DECODER))
    encoder.save_pretrained(tmp_path / "encoder")
    decoder.save_pretrained(tmp_path / "decoder")
    make = NvibForConditionalGeneration.from_encoder_decoder_pretrained
    joined = make(str(tmp_path / "encoder"), str(tmp_path / "decoder"), kappa=2).eval()
    assert isinstance(joined.base, EncoderDecoderModel) and joined.config.kappa == 2
    models = make(encoder, decoder, kappa=2).eval()
    for name, value in tensors(models).items():
        assert torch.equal(tensors(joined)[name], value), name
    tokens = joined.generate(**tiny_inputs("bert2gpt2"), max_new_tokens=3, do_sample=False)
    assert tokens[:, 0].tolist() == [joined.generation_config.decoder_start_token_id] * 3


def test_joining_with_a_fresh_decoder_of_another_width():
    encoder = BertModel(BertConfig(**BERT_LIKE)).eval()
    config = BertConfig(**{**BERT_LIKE, "hidden_size": 24, "num_attention_heads": 3})
    model = NvibForConditionalGeneration.from_encoder_decoder_pretrained(encoder, config).eval()
    assert not config.is_decoder  # the caller's configuration is not changed
    assert isinstance(model.base.decoder, BertLMHeadModel) and model.nvib.size_out == 24
    assert model.encode(**tiny_inputs("bert2bert")).z.shape == (3, 10, 24)
    assert (model.generate(**tiny_inputs("bert2bert"), max_new_tokens=3, pad_token_id=PAD)).shape[0] == 3


def test_unwrap_gives_the_base_back_with_its_trained_weights():
    base = tiny_base("bart")
    model, expected = wrap(base), tiny_base("bart")
    before = logits(expected)
    with torch.no_grad():
        for module in (base, expected):
            module.get_decoder().layers[0].encoder_attn.k_proj.weight.mul_(2)
    unwrapped = model.unwrap()
    assert unwrapped is base
    assert [type(m).__name__ for m in unwrapped.modules()] == [type(m).__name__ for m in expected.modules()]
    assert torch.equal(logits(unwrapped), logits(expected)) and not torch.equal(logits(expected), before)
    assert_close(logits(wrap(unwrapped)), logits(expected), rtol=0, atol=1e-3)


def test_freeze_base_trains_the_bottleneck_alone():
    model = tiny_nvib(lambda_gaussian=0.1, lambda_dirichlet=0.1)
    assert model.freeze_base() is model
    before = {name: value.clone() for name, value in tensors(model).items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**tiny_inputs("bart"), labels=tiny_labels("bart")).loss.backward()
    optimiser.step()
    moved = {name for name, value in tensors(model).items() if not torch.equal(value, before[name])}
    assert moved == {f"nvib.{name}" for name, _ in model.nvib.named_parameters()}


# ------------------------------------------------------------------------------------------------------ fitted prior
@pytest.mark.parametrize("family", FAMILIES)
def test_fit_prior_takes_the_encoder_s_statistics(family, tmp_path):
    model = wrap(tiny_base(family)).train()
    batches = [{**tiny_inputs(family, seed=seed), "labels": tiny_labels(family)} for seed in range(8)]
    prior = model.fit_prior(batches)
    assert model.training
    with torch.no_grad():
        model.eval()
        vectors = torch.cat(
            [
                model.get_encoder()(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).last_hidden_state[
                    x["attention_mask"].bool()
                ]
                for x in batches
            ]
        )
    assert_close(prior.prior_mu, vectors.mean(0))
    assert_close(prior.prior_var, vectors.var(0))
    energy = 0.5 * model.scale * vectors.square().sum(-1)
    assert_close(prior.prior_log_alpha, energy.mean())
    assert_close(prior.prior_log_alpha_std, energy.std())
    assert_close(model.nvib.prior_mu, vectors.mean(0))
    assert_close(model.nvib.prior_logvar.exp(), vectors.var(0))
    latents = model.sample_latents(200, 10)
    assert_close(latents.z.flatten(0, 1).mean(0), vectors.mean(0), rtol=0, atol=0.15)
    # The layer was initialised for it: the model still computes the base's function, and keeps its prior when saved.
    assert_close(logits(model, family), logits(tiny_base(family), family), rtol=0, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.nvib.prior_mu, model.nvib.prior_mu)
    assert torch.equal(logits(loaded, family), logits(model, family))


def test_fit_prior_sees_no_dropout():
    model = wrap(tiny_base("bart", dropout=0.5)).train()
    batches = [tiny_inputs("bart", seed=seed) for seed in range(3)]
    expected = wrap(tiny_base("bart")).fit_prior(batches)
    assert_close(model.fit_prior(batches), expected)
    assert model.training


def test_fit_prior_that_fails_changes_nothing():
    model = wrap(tiny_base("bart")).train()
    before = {name: value.clone() for name, value in tensors(model).items()}
    with pytest.raises(ValueError, match="at least two source vectors"):
        model.fit_prior([])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())


# --------------------------------------------------------------------------------------------------------- vocabulary
@pytest.mark.parametrize("family", ["bart", "t5", "bert2bert"])
def test_resize_token_embeddings(family, tmp_path):
    """Tied embeddings: BART's, untied, Transformers resizes only in part."""
    model = wrap(tiny_base(family))
    inputs, labels = tiny_inputs(family), tiny_labels(family)
    before = logits(model, family)
    embeddings = model.resize_token_embeddings(VOCAB_SIZE + 5, mean_resizing=False)
    assert embeddings.num_embeddings == VOCAB_SIZE + 5 == model.get_output_embeddings().out_features
    assert model.get_input_embeddings().num_embeddings == VOCAB_SIZE + 5
    after = logits(model, family)
    assert after.shape[-1] == VOCAB_SIZE + 5
    assert_close(after[..., :VOCAB_SIZE], before)
    inputs["input_ids"][0, 0] = labels[0, 0] = VOCAB_SIZE + 3  # the new tokens are read and written
    outputs = model(**inputs, labels=labels)
    outputs.loss.backward()
    assert model.get_input_embeddings().weight.grad[VOCAB_SIZE + 3].abs().sum() > 0
    assert model.get_output_embeddings().weight.grad[VOCAB_SIZE + 3].abs().sum() > 0
    table = model.get_decoder().get_input_embeddings().weight
    assert model.get_output_embeddings().weight is table
    model.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, family, **inputs), logits(model, family, **inputs))
    assert loaded.get_output_embeddings().weight is loaded.get_decoder().get_input_embeddings().weight
    if family == "bart":
        assert loaded.base.final_logits_bias.shape == (1, VOCAB_SIZE + 5)
        assert model.config.vocab_size == loaded.config.vocab_size == VOCAB_SIZE + 5


def test_resize_of_two_vocabularies_asks_which():
    encoder = BertModel(BertConfig(**{**BERT_LIKE, "vocab_size": 50}))
    decoder = GPT2LMHeadModel(GPT2Config(**GPT2_LIKE, **DECODER))
    model = NvibForConditionalGeneration.from_encoder_decoder_pretrained(encoder, decoder)
    with pytest.raises(ValueError, match=r"50 tokens and the decoder one of 99.*model\.base\.decoder\.resize"):
        model.resize_token_embeddings(120)
    model.base.decoder.resize_token_embeddings(120)
    inputs = {"input_ids": torch.randint(3, 50, (2, 4))}
    assert model(**inputs, labels=torch.full((2, 3), 110)).logits.shape == (2, 3, 120)


# ------------------------------------------------------------------------------------------------------ what is shared
def test_settings_of_the_loss_are_read_where_they_stand():
    model, inputs, labels = tiny_nvib(), tiny_inputs("bart"), tiny_labels("bart")
    with torch.no_grad():
        free = model(**inputs, labels=labels)
        model.config.lambda_gaussian = 0.5
        paid = model(**inputs, labels=labels)
    tokens = (labels != -100).sum(-1)
    assert_close(paid.loss - free.loss, 0.5 * (tokens * free.kl_gaussian).sum() / tokens.sum())


def test_missing_weights_of_the_base_are_drawn_by_its_own_rules():
    """T5's layers draw the weights of their parts, each with a scale of its own."""
    config = NvibConfig(base_config=tiny_base("t5").config)
    model = NvibForConditionalGeneration.from_pretrained(None, config=config, state_dict={})
    query = model.base.get_encoder().block[0].layer[0].SelfAttention.q
    assert_close(query.weight.std().item(), (32 * 8) ** -0.5, rtol=0.15, atol=0)


def test_every_cross_attention_is_converted_and_no_other():
    model = tiny_nvib("bert2gpt2")
    assert len(cross_attention(model)) == 2
    assert {type(module).__name__ for module in cross_attention(model)} == {"DenoisingGPT2Attention"}


def test_latents_are_what_encode_gives():
    outputs = tiny_nvib()(**tiny_inputs("bart"), labels=tiny_labels("bart"))
    assert isinstance(outputs.latents, NvibLatents)
    for name in ("kl_gaussian", "kl_dirichlet", "num_vectors", "prop_vectors", "effective_vectors"):
        assert torch.equal(outputs[name], outputs.latents[name]) and outputs[name].shape == (3,)
