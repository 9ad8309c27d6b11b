"""Nonparametric Variational Information Bottleneck for PyTorch and Hugging Face Transformers."""

from importlib.util import find_spec

from . import layers
from .layers import (
    DenoisingMultiheadAttention,
    EmpiricalPrior,
    Nvib,
    NvibMemory,
    denoising_attention,
    empirical_prior,
    kl_dirichlet,
    kl_gaussian,
    naive_denoising_attention,
)

__version__ = "0.1.0"

_TORCH = layers.__all__
_TRANSFORMERS = [
    "AttentionSpec",
    "CollapseCallback",
    "CollapseWarning",
    "ConstraintCallback",
    "ConstraintWarning",
    "CrossAttention",
    "EvaluationGapWarning",
    "KLAnnealingCallback",
    "NvibConfig",
    "NvibForConditionalGeneration",
    "NvibForSequenceClassification",
    "NvibForTokenClassification",
    "NvibLatents",
    "NvibTrainer",
    "NvibTrainerMixin",
    "SelfAttention",
    "ThresholdCallback",
    "add_to_model_card",
    "concatenate_latents",
    "evaluate",
    "evaluation_section",
    "latent_distance",
    "register_attention",
    "register_cross_attention",
    "register_self_attention",
    "search_taus",
]

if find_spec("transformers") is not None:
    from transformers import (
        AutoConfig,
        AutoModelForAudioClassification,
        AutoModelForImageClassification,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from .configuration_nvib import NvibConfig
    from .evaluation.evaluate import evaluate
    from .evaluation.report import add_to_model_card, evaluation_section
    from .latents.latents import NvibLatents, concatenate_latents
    from .latents.transport import latent_distance
    from .modeling_nvib import NvibForConditionalGeneration
    from .modeling_nvib_classification import NvibForSequenceClassification, NvibForTokenClassification
    from .training.annealing import KLAnnealingCallback
    from .training.collapse import CollapseCallback, CollapseWarning, EvaluationGapWarning
    from .training.constraint import ConstraintCallback
    from .training.messages import ConstraintWarning
    from .training.tau_search import search_taus
    from .training.threshold import ThresholdCallback
    from .training.trainer import NvibTrainer, NvibTrainerMixin
    from .wrapping.specs import (
        AttentionSpec,
        CrossAttention,
        SelfAttention,
        register_attention,
        register_cross_attention,
        register_self_attention,
    )

    AutoConfig.register(NvibConfig.model_type, NvibConfig)
    AutoModelForSeq2SeqLM.register(NvibConfig, NvibForConditionalGeneration)
    AutoModelForSequenceClassification.register(NvibConfig, NvibForSequenceClassification)
    AutoModelForImageClassification.register(NvibConfig, NvibForSequenceClassification)
    AutoModelForAudioClassification.register(NvibConfig, NvibForSequenceClassification)
    AutoModelForTokenClassification.register(NvibConfig, NvibForTokenClassification)
    __all__ = [*_TORCH, *_TRANSFORMERS]
else:
    __all__ = _TORCH

    def __getattr__(name: str):
        if name in _TRANSFORMERS:
            raise ImportError(
                f"nvib_hf.{name} needs the package transformers, which is not installed. Install it with "
                "`pip install 'transformers>=5.23,<5.25' accelerate`."
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
