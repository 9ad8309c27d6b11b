"""Register NVIB models where Transformers looks for them: in Auto classes and in the tables of pipelines."""

from __future__ import annotations

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

# The Auto classes that know bases. Which one fits depends on the base, as its modality does.
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
# A pipeline for speech treats a model that is not in these tables as a CTC model.
NAMES = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
)
# The Auto class for the code of a saved model, by the encoder's input.
IN_SAVED_CODE = {
    "input_features": "AutoModelForSpeechSeq2Seq",
    "input_values": "AutoModelForSpeechSeq2Seq",
    "pixel_values": "AutoModelForImageTextToText",
}


def register_everywhere(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """Let every Auto class that knows bases load NVIB models too."""
    for name in AUTO_CLASSES:
        if (auto_class := getattr(transformers, name, None)) is not None:
            auto_class.register(config_class, model_class, exist_ok=True)


for _table in NAMES:  # at import, also of code loaded from the Hub
    getattr(modeling_auto, _table).setdefault("nvib", "NvibForConditionalGeneration")
