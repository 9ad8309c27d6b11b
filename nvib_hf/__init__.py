"""Nonparametric Variational Information Bottleneck for PyTorch and Hugging Face Transformers."""

from importlib.util import find_spec

from .denoising_attention import denoising_attention, naive_denoising_attention
from .initialisation import EmpiricalPrior, empirical_prior
from .kl import kl_dirichlet, kl_gaussian
from .memory import NvibMemory
from .multihead_attention import DenoisingMultiheadAttention
from .published_layer import Nvib

__version__ = "0.1.0"

_TORCH = [
    "DenoisingMultiheadAttention",
    "EmpiricalPrior",
    "Nvib",
    "NvibMemory",
    "denoising_attention",
    "empirical_prior",
    "kl_dirichlet",
    "kl_gaussian",
    "naive_denoising_attention",
]
_TRANSFORMERS = [
    "CollapseCallback",
    "CollapseWarning",
    "ConstraintCallback",
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

    from .architectures import CrossAttention, register_cross_attention
    from .callbacks import ConstraintCallback, KLAnnealingCallback, ThresholdCallback
    from .collapse import CollapseCallback, CollapseWarning, EvaluationGapWarning
    from .configuration_nvib import NvibConfig
    from .evaluation import evaluate
    from .evaluation_report import add_to_model_card, evaluation_section
    from .latent import NvibLatents, concatenate_latents
    from .latent_transport import latent_distance
    from .modeling_encoder import NvibForSequenceClassification, NvibForTokenClassification
    from .modeling_nvib import NvibForConditionalGeneration
    from .self_architectures import SelfAttention, register_self_attention
    from .tau_search import search_taus
    from .trainer import NvibTrainer, NvibTrainerMixin

    AutoConfig.register(NvibConfig.model_type, NvibConfig)
    AutoModelForSeq2SeqLM.register(NvibConfig, NvibForConditionalGeneration)
    AutoModelForSequenceClassification.register(NvibConfig, NvibForSequenceClassification)
    AutoModelForImageClassification.register(NvibConfig, NvibForSequenceClassification)
    AutoModelForAudioClassification.register(NvibConfig, NvibForSequenceClassification)
    AutoModelForTokenClassification.register(NvibConfig, NvibForTokenClassification)
    NvibConfig.register_for_auto_class()
    NvibForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
    NvibForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
    NvibForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
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
