"""Where Transformers looks for a model: its Auto classes, and the names by which pipelines tell models apart."""

from __future__ import annotations

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

# Those in which a base is registered; which of them fits is the base's business, as its modality is.
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForPreTraining",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForVision2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
)
# A pipeline for speech takes what is not named here for a model with CTC.
NAMES = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
)
# In the code that a saved model brings, by what its encoder reads.
IN_SAVED_CODE = {
    "input_features": "AutoModelForSpeechSeq2Seq",
    "input_values": "AutoModelForSpeechSeq2Seq",
    "pixel_values": "AutoModelForImageTextToText",
}


def register_everywhere(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """Let every Auto class that has bases load a model around them."""
    for name in AUTO_CLASSES:
        if (auto_class := getattr(transformers, name, None)) is not None:
            auto_class.register(config_class, model_class, exist_ok=True)


for _table in NAMES:  # wherever this is imported, in code that was loaded from the Hub too
    getattr(modeling_auto, _table).setdefault("nvib", "NvibForConditionalGeneration")
