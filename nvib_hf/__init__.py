"""Nonparametric Variational Information Bottleneck for PyTorch and Hugging Face Transformers."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, NoReturn

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

# First what needs torch alone, then what needs Transformers. A plain list, as type checkers read it too.
__all__ = [
    "DenoisingMultiheadAttention",
    "EmpiricalPrior",
    "Nvib",
    "NvibMemory",
    "denoising_attention",
    "empirical_prior",
    "kl_dirichlet",
    "kl_gaussian",
    "naive_denoising_attention",
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
    "decode_latents",
    "encode_texts",
    "evaluate",
    "evaluation_section",
    "latent_distance",
    "latent_distances",
    "nearest",
    "reconstruct",
    "register_attention",
    "register_cross_attention",
    "register_self_attention",
    "search_taus",
]

if TYPE_CHECKING or find_spec("transformers") is not None:
    from transformers import (
        AutoConfig,
        AutoModelForAudioClassification,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from .configuration_nvib import NvibConfig
    from .evaluation.evaluate import evaluate
    from .evaluation.report import add_to_model_card, evaluation_section
    from .evaluation.texts import decode_latents, encode_texts, reconstruct
    from .latents.latents import NvibLatents, concatenate_latents
    from .latents.neighbours import latent_distances, nearest
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
    from .wrapping.auto_classes import register_everywhere
    from .wrapping.specs import (
        AttentionSpec,
        CrossAttention,
        SelfAttention,
        register_attention,
        register_cross_attention,
        register_self_attention,
    )

    AutoConfig.register(NvibConfig.model_type, NvibConfig)
    register_everywhere(NvibConfig, NvibForConditionalGeneration)
    AutoModelForSequenceClassification.register(NvibConfig, NvibForSequenceClassification)
    AutoModelForImageClassification.register(NvibConfig, NvibForSequenceClassification)
    AutoModelForAudioClassification.register(NvibConfig, NvibForSequenceClassification)
    AutoModelForTokenClassification.register(NvibConfig, NvibForTokenClassification)
else:
    _NEED_TRANSFORMERS = set(__all__) - set(layers.__all__)
    __all__ = layers.__all__

    def __getattr__(name: str) -> NoReturn:
        if name in _NEED_TRANSFORMERS:
            raise ImportError(
                f"nvib_hf.{name} needs the package transformers, which is not installed. Install it with "
                "`pip install 'transformers>=5.18,<5.25' accelerate`."
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
