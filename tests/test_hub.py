"""Models pushed to a hub and loaded from it, with their code, in processes of their own; and folders that are broken.

The hub is a small server of the tests: its address has to stand in the environment before anything is imported.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file
from tiny_models import tiny_base, tiny_inputs
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from nvib_hf import Nvib, NvibConfig, NvibForConditionalGeneration
from nvib_hf.wrapping.hub import flattened

# What a model needs to run: neither training, but that of its learned prior, nor the parts for plain PyTorch.
CODE = {
    "configuration_nvib.py",
    "files.py",
    "generation_nvib.py",
    "latents_checks.py",
    "latents_latents.py",
    "latents_learned.py",
    "latents_merging.py",
    "latents_refining.py",
    "latents_sampling.py",
    "latents_transport.py",
    "layers_causal_transformer.py",
    "layers_code_search.py",
    "layers_codebook.py",
    "layers_cross_entropy.py",
    "layers_denoising_attention.py",
    "layers_distributions.py",
    "layers_dropping.py",
    "layers_exporting.py",
    "layers_initialisation.py",
    "layers_kl.py",
    "layers_latent_prior.py",
    "layers_merging.py",
    "layers_moving_codes.py",
    "layers_mutual_neighbours.py",
    "layers_nvib.py",
    "layers_settings.py",
    "loss.py",
    "modeling_nvib.py",
    "outputs.py",
    "training_latent_prior_training.py",
    "versions.py",
    "wrapping_adapters.py",
    "wrapping_architecture.py",
    "wrapping_auto_classes.py",
    "wrapping_base.py",
    "wrapping_cached_keys.py",
    "wrapping_cross_attention.py",
    "wrapping_halves.py",
    "wrapping_hub.py",
    "wrapping_model_card.py",
    "wrapping_pretrained.py",
    "wrapping_self_attention.py",
    "wrapping_sound.py",
    "wrapping_source.py",
    "wrapping_specs.py",
    "wrapping_stacked_encoder.py",
    "wrapping_wrap.py",
}
AUTO_MAP = {
    "AutoConfig": "configuration_nvib.NvibConfig",
    "AutoModel": "modeling_nvib.NvibForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_nvib.NvibForConditionalGeneration",
}

PUSH = """
import json
import sys
from tiny_models import tiny_base, tiny_inputs
from tiny_text import tiny_collator, tiny_examples, tiny_tokenizer
from transformers import Seq2SeqTrainingArguments

from nvib_hf import NvibForConditionalGeneration, NvibTrainer

base = tiny_base("bart")
base.config.name_or_path = "someone/base"
base.generation_config.num_beams = 3
base.generation_config.max_new_tokens = 7
model = NvibForConditionalGeneration.from_base_pretrained(base, tau_sigma=0.1, delta=0.5, kappa=2)
inputs = tiny_inputs("bart")
results = {
    "tokens": model.generate(**inputs).tolist(),
    "logits": model(**inputs, decoder_input_ids=inputs["input_ids"]).logits[0, :, :3].tolist(),
}
model.push_to_hub("user/private", private=True, token="hf_other", commit_message="First", tags=["mine"])
tiny_tokenizer().push_to_hub("user/private")
model.push_to_hub("user/sharded", revision="smaller", max_shard_size="60KB")
model.push_to_hub("user/own")
model.save_pretrained(sys.argv[1] + "/saved", push_to_hub=True, repo_id="user/saved")

arguments = Seq2SeqTrainingArguments(
    sys.argv[1] + "/trained", hub_model_id="user/trained", push_to_hub=True, max_steps=2, eval_strategy="steps",
    eval_steps=1, logging_steps=1, save_strategy="steps", save_steps=1, report_to="none", use_cpu=True,
    disable_tqdm=True, learning_rate=0.0, seed=1,
)
trainer = NvibTrainer(
    model, arguments, train_dataset=tiny_examples(8), eval_dataset=tiny_examples(4, seed=1),
    data_collator=tiny_collator(), processing_class=tiny_tokenizer(),
)
trainer.train()
metrics = trainer.evaluate()
trainer.push_to_hub(dataset="Verses", language="en", license="mit")
print("PUSHED", json.dumps({**results, "metrics": metrics}))
"""

WITHOUT_THE_PACKAGE = """
import sys

class Blocked:
    def find_spec(self, name, *arguments):
        assert name.split(".")[0] != "nvib_hf", "the package is not here"

sys.meta_path.insert(0, Blocked())
"""

LOAD = """
import json
import torch
from tiny_models import tiny_inputs
from transformers import AutoConfig, AutoModelForSeq2SeqLM

def results(name, **options):
    global model
    model = AutoModelForSeq2SeqLM.from_pretrained(name, trust_remote_code=True, **options)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    inputs = tiny_inputs("bart")
    logits = model(**inputs, decoder_input_ids=inputs["input_ids"]).logits[0, :, :3]
    return {"tokens": model.generate(**inputs).tolist(), "logits": logits.tolist()}

loaded = {name: results(name) for name in ["user/private", "user/saved", "user/trained"]}
loaded["a revision"] = results("user/sharded", revision="smaller")
loaded["a checkpoint"] = results(sys.argv[1] + "/trained/checkpoint-2")
model.push_to_hub("user/again")  # what was loaded can be pushed again, and goes on working
loaded["again"] = results("user/again")

config = AutoConfig.from_pretrained("user/private", trust_remote_code=True)
assert (config.delta, config.kappa, config.base_config.model_type) == (0.5, 2, "bart")
print("LOADED", json.dumps(loaded))
"""

SNIPPET = """
import json, re
from huggingface_hub import hf_hub_download

with open(hf_hub_download(sys.argv[1], "README.md"), encoding="utf-8") as card:
    exec(re.search(r"```python\\n(.*?)```", card.read(), re.DOTALL)[1])
tokens = model.generate(**inputs, max_new_tokens=32)
print("LOADED", json.dumps(tokenizer.batch_decode(tokens, skip_special_tokens=True)))
"""


def run(script, hub, home, *arguments, printed=None):
    """A script in a process of its own, without a terminal: the JSON that it prints last.

    ``printed`` gets all that it printed, and what it wrote to its log.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_token", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    here = Path(__file__).parent
    environment |= {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=home,
        stdin=subprocess.DEVNULL,
    )
    if printed is not None:
        printed += [done.stdout, done.stderr]
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(re.findall(r"^(?:PUSHED|LOADED) (.*)$", done.stdout, re.MULTILINE)[-1])


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The hub after everything was pushed, what was generated then, and where."""
    folder = tmp_path_factory.mktemp("pushed")
    with LoopbackHub() as hub:
        hub.private["user/own"] = False
        hub.commit("user/own", "main", {"README.md": b"---\nlicense: mit\n---\n\nBy hand.\n"})
        yield hub, run(PUSH, hub, folder, folder), folder


def test_push_brings_everything(pushed):
    hub, _, _ = pushed
    files = hub.files("user/private")
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    whole = {"model.safetensors", "config.json", "generation_config.json", "README.md"}
    assert set(files) == CODE | whole | tokenizer
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    assert json.loads(files["generation_config.json"])["num_beams"] == 3
    sources = flattened(Path(__file__).parents[1] / "nvib_hf" / "modeling_nvib.py")
    for name in CODE:
        assert files[name].decode() == sources[name]
    assert CODE | whole == set(hub.files("user/saved"))
    assert CODE | whole | tokenizer | {"training_args.bin"} == set(hub.files("user/trained"))


def test_push_passes_its_arguments_on(pushed):
    hub, _, _ = pushed
    private = {"user/private": True, "user/saved": False, "user/trained": False, "user/sharded": False}
    assert {name: hub.private[name] for name in private} == private
    assert "Bearer hf_other" in hub.tokens and "First" in hub.messages
    assert not hub.files("user/sharded")
    shards = [name for name in hub.files("user/sharded", "smaller") if "-of-" in name]
    assert len(shards) > 2 and "model.safetensors.index.json" in hub.files("user/sharded", "smaller")


def header_and_text(files):
    _, header, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(header), text


def test_push_brings_the_card(pushed):
    hub, sent, _ = pushed
    for name, branch in (("private", "main"), ("saved", "main"), ("sharded", "smaller")):
        header, text = header_and_text(hub.files(f"user/{name}", branch))
        assert header["tags"] == ["nvib", "mine"] and header["base_model"] == ["someone/base"]
        assert f'from_pretrained("user/{name}", trust_remote_code=True)' in text
        assert "## Training" not in text and "automatically generated" not in text
    header, text = header_and_text(hub.files("user/trained"))
    assert header["license"] == "mit" and header["language"] == ["en"] and "nvib" in header["tags"]
    assert "2 steps on Verses" in text and 'from_pretrained("user/trained", trust_remote_code=True)' in text
    for name in ("loss", "cross_entropy", "kl_gaussian", "kl_dirichlet", "effective_vectors"):
        found = re.search(rf"^\| {name} *\| ([\d.]+) *\| ([\d.]+) *\|$", text, re.MULTILINE)
        assert float(found[2]) == pytest.approx(sent["metrics"][f"eval_{name}"], abs=6e-5)


def test_own_card_of_a_repository_stays(pushed):
    """What was written by hand on the hub is not replaced by the next push."""
    hub, _, _ = pushed
    header, text = header_and_text(hub.files("user/own"))
    assert "model.safetensors" in hub.files("user/own")
    assert text.strip() == "By hand." and header == {"license": "mit", "tags": ["nvib", "mine"]}


def test_loads_without_the_package(pushed):
    """A process that cannot import nvib_hf runs the uploaded code to the same end."""
    hub, sent, folder = pushed
    loaded = run(WITHOUT_THE_PACKAGE + LOAD, hub, folder, folder)
    assert len(loaded) == 6
    for name, results in loaded.items():
        assert results == {"tokens": sent["tokens"], "logits": sent["logits"]}, name


@pytest.mark.parametrize("name", ["user/private", "user/trained"])
def test_snippet_of_the_card_runs_without_the_package(name, pushed, tmp_path):
    """Copied into a fresh process with an empty cache: it asks nothing, and complains of nothing."""
    hub, _, _ = pushed
    printed = []
    texts = run(WITHOUT_THE_PACKAGE + SNIPPET, hub, tmp_path, name, printed=printed)
    output = "".join(printed)
    assert str(texts) == output.splitlines()[0] and len(texts) == 2  # what the snippet itself prints first
    for complaint in ("custom code", "of type ``", "[y/N]", "Traceback"):
        assert complaint not in output


# ---------------------------------------------------------------------------------------------- folders
@pytest.fixture
def folder(tmp_path):
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path


def test_folder_holds_the_model_and_its_code_alone(folder):
    whole = {"model.safetensors", "config.json", "generation_config.json", "README.md"}
    assert {path.name for path in (folder / "whole").iterdir()} == CODE | whole
    assert json.loads((folder / "whole" / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name in CODE:
        assert "nvib_hf import" not in (folder / "whole" / name).read_text()


def test_auto_classes_know_it(folder):
    assert type(AutoConfig.from_pretrained(folder / "whole")) is NvibConfig
    assert type(AutoModelForSeq2SeqLM.from_pretrained(folder / "whole")) is NvibForConditionalGeneration
    config = NvibConfig(base_config=tiny_base("t5").config)
    assert type(AutoModelForSeq2SeqLM.from_config(config).base).__name__ == "T5ForConditionalGeneration"


def test_folders_of_the_author_are_not_named(tmp_path):
    """Where a base was loaded from is kept if others can load it from there."""
    tiny_base("bart").save_pretrained(tmp_path / "base")
    model = NvibForConditionalGeneration.from_base_pretrained(str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "nvib")
    assert all(str(tmp_path) not in path.read_text() for path in (tmp_path / "nvib").glob("*.[jm]*[nd]"))
    model.base.config.name_or_path = "someone/base"
    model.save_pretrained(tmp_path / "nvib")
    assert NvibConfig.from_pretrained(tmp_path / "nvib").base_config.name_or_path == "someone/base"


@pytest.mark.parametrize("family", ["bart", "t5", "bert2gpt2"])
def test_folder_of_a_base_says_what_to_call(family, tmp_path):
    tiny_base(family).save_pretrained(tmp_path)
    for load in (NvibForConditionalGeneration.from_pretrained, NvibConfig.from_pretrained):
        with pytest.raises(ValueError, match=r"not an NVIB model.*call NvibForConditionalGeneration\.from_base_pretr"):
            load(tmp_path)
    model = NvibForConditionalGeneration.from_base_pretrained(str(tmp_path))
    model.save_pretrained(tmp_path / "nvib")
    with pytest.raises(ValueError, match=r"is an NVIB model already.*NvibForConditionalGeneration\.from_pretrained"):
        NvibForConditionalGeneration.from_base_pretrained(str(tmp_path / "nvib"))


def cut(name, share=0.5):
    """The file's beginning is all that is left of it."""

    def damage(folder):
        file = next(folder.glob(name))
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return damage


def without(name):
    return lambda folder: next(folder.glob(name)).unlink()


def newer(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"config_version": 99, "alpha_activation": "softplus", "prior_alpha": [1.0, 2.0], "unheard_of": True}
    (folder / "config.json").write_text(json.dumps(config))


def without_weights_of_the_layer(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "nvib." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "damage", "error", "message"),
    [
        ("whole", cut("model.safetensors"), OSError, r"The checkpoint .*case is damaged .*Fetch it again"),
        ("whole", cut("model.safetensors", 0.001), OSError, r"The checkpoint .*case is damaged .*Fetch it again"),
        ("whole", cut("model.safetensors", 0), OSError, r"The checkpoint .*case is damaged .*Fetch it again"),
        ("whole", without("model.safetensors"), OSError, r"no file named model.safetensors.*case"),
        (
            "whole",
            without_weights_of_the_layer,
            OSError,
            r"case lacks \d+ of the model's weights \(nvib\.alpha_bias, ",
        ),
        ("whole", cut("config.json"), OSError, r"case/config.json' is not a valid JSON file"),
        ("whole", without("config.json"), OSError, r"case has no config.json"),
        ("whole", newer, ValueError, r"newer nvib_hf \(config_version 99.*pip install -U"),
        ("sharded", without("model-00002-*"), OSError, r"case/model-00002-of-"),
        ("sharded", cut("model-00002-*"), OSError, r"The checkpoint .*case is damaged .*Fetch it again"),
        ("sharded", cut("*.index.json"), OSError, r"The checkpoint .*case is damaged .*Fetch it again"),
        ("sharded", without("*.index.json"), OSError, r"no file named model.safetensors.*case"),
    ],
)
def test_broken_folder_is_refused(kind, damage, error, message, folder):
    """By the model and by the auto class; and looking at it changes nothing in it."""
    case = shutil.copytree(folder / kind, folder / "case")
    damage(case)
    before = {path.name: path.read_bytes() for path in case.iterdir()}
    loaders = [NvibForConditionalGeneration.from_pretrained]
    if (case / "config.json").exists():
        loaders.append(AutoModelForSeq2SeqLM.from_pretrained)
    for load in loaders:
        with pytest.raises(error, match=message):
            load(case)
    assert {path.name: path.read_bytes() for path in case.iterdir()} == before


def test_broken_folder_of_a_base_is_refused(tmp_path):
    tiny_base("bart").save_pretrained(tmp_path)
    cut("model.safetensors")(tmp_path)
    with pytest.raises(OSError, match="is damaged"):
        NvibForConditionalGeneration.from_base_pretrained(str(tmp_path))


def test_missing_weights_can_be_wanted(folder):
    without_weights_of_the_layer(folder / "whole")
    load = NvibForConditionalGeneration.from_pretrained
    _, info = load(folder / "whole", output_loading_info=True)
    assert "nvib.alpha_bias" in info["missing_keys"]
    fresh = load(folder / "whole", ignore_mismatched_sizes=True)
    expected = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"))
    inputs = tiny_inputs("bart")
    tokens = {"decoder_input_ids": torch.tensor([[2, 7, 8]] * 3)}
    torch.testing.assert_close(fresh(**inputs, **tokens).logits, expected(**inputs, **tokens).logits)


@pytest.fixture
def nan_where_uninitialised():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", [*Nvib(4, 4).state_dict()])
def test_a_missing_weight_starts_afresh_and_the_others_are_loaded(name, folder, nan_where_uninitialised):
    """Its parameters trained, its prior as it was: the identity is that of the prior."""
    layer = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart")).nvib
    expected = layer.state_dict()
    file = folder / "whole" / "model.safetensors"
    weights = load_file(file)
    for parameter, _ in layer.named_parameters():
        weights[f"nvib.{parameter}"] += 1
        if parameter != name:
            expected[parameter] = weights[f"nvib.{parameter}"]
    del weights[f"nvib.{name}"]
    save_file(weights, file, metadata={"format": "pt"})
    loaded = NvibForConditionalGeneration.from_pretrained(folder / "whole", ignore_mismatched_sizes=True)
    for other, value in loaded.nvib.state_dict().items():
        torch.testing.assert_close(value, expected[other], rtol=0, atol=0)
