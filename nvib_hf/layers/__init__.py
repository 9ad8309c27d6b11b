"""The mathematics in plain PyTorch: the NVIB layer, its distributions and divergences, denoising attention."""

from .denoising_attention import denoising_attention, naive_denoising_attention
from .initialisation import EmpiricalPrior, empirical_prior
from .kl import kl_dirichlet, kl_gaussian
from .published import DenoisingMultiheadAttention, Nvib, NvibMemory

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
]
