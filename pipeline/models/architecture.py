"""Chooses the class that loads a checkpoint: the one that config.json names, if it is of a supported kind."""

import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedConfig
from transformers.models.auto import modeling_auto

from pipeline.runtime.errors import UserError


def _names(mapping: dict[str, Any]) -> set[str]:
    return {name for value in mapping.values() for name in ((value,) if isinstance(value, str) else value)}


# multimodal models contain a language model; only their own class loads the whole checkpoint
LANGUAGE = {
    name.casefold(): name  # LLaMA's first checkpoints say LLaMAForCausalLM
    for name in _names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    | _names(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
}

CLASSIFIERS = _names(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


def classifies_images(config: PreTrainedConfig) -> bool:
    """Whether a model is an image classifier: its config.json names such a class, or its type has no other."""
    if config.architectures:
        return config.architectures[0] in CLASSIFIERS or _has_own(config, AutoModelForImageClassification)
    is_text = type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    return not is_text and type(config) in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def _has_own(config: PreTrainedConfig, auto_class: type) -> bool:
    return auto_class.__name__ in (getattr(config, "auto_map", None) or {})


def model_class(folder: Path, config: PreTrainedConfig, own_code: bool) -> Any:
    """The class to load a checkpoint with. An Auto class if config.json names no known class, or if the model brings its own
    code and `own_code` allows it. All have `from_pretrained`, and `from_config` (Auto classes) or `_from_config`.

    Raises `UserError` if the folder holds neither a causal language model nor an image classifier.
    """
    if classifies_images(config):
        return _classifier_class(folder, config, own_code)
    known = type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if _has_own(config, AutoModelForCausalLM) and (own_code or not known):
        return AutoModelForCausalLM  # refuses the code unless trust_remote_code is set
    named = (config.architectures or [""])[0]
    found = getattr(transformers, LANGUAGE.get(named.casefold(), ""), None)
    if found is not None and isinstance(config, found.config_class):
        inputs = inspect.signature(found.forward).parameters
        needed = [name for name, p in inputs.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        needed = [name for name in needed if name not in ("self", "input_ids")]
        if config.is_encoder_decoder and not named.endswith("ForCausalLM"):
            raise _refusal(folder, named, "an encoder-decoder, not a causal language model")
        if "input_ids" not in inputs or needed:
            raise _refusal(folder, named, f"no text-only model: it needs {needed[0] if needed else 'other inputs'}")
        return found
    if known and (not named or named.endswith(("ForCausalLM", "LMHeadModel"))):
        return AutoModelForCausalLM
    raise _refusal(folder, named or type(config).__name__, "neither a causal language model nor an image classifier")


def _classifier_class(folder: Path, config: PreTrainedConfig, own_code: bool) -> Any:
    named = (config.architectures or [""])[0]
    found = getattr(transformers, named, None) if named in CLASSIFIERS else None
    if _has_own(config, AutoModelForImageClassification) and (own_code or found is None):
        return AutoModelForImageClassification  # refuses the code unless trust_remote_code is set
    if found is None:
        return AutoModelForImageClassification
    if found.main_input_name != "pixel_values":
        raise _refusal(folder, named, f"no classifier of pixel values: it reads {found.main_input_name}")
    return found


def _refusal(folder: Path, named: str, why: str) -> UserError:
    return UserError(
        f"{folder} holds a {named} (config.json), which is {why}: set model=... to a ...ForCausalLM, a multimodal model "
        "that generates text, or a ...ForImageClassification"
    )
