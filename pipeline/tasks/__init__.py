"""What kinds of models do: `of(config)` returns the `Task`, with all that the stages need to know besides the layers."""

from transformers import PreTrainedConfig

from pipeline.models.architecture import classifies_images
from pipeline.tasks.image_classification import ImageClassification
from pipeline.tasks.language_modeling import LanguageModeling
from pipeline.tasks.task import Task

__all__ = ["Task", "of"]


def of(config: PreTrainedConfig) -> Task:
    """The task of a model, by its configuration."""
    return ImageClassification() if classifies_images(config) else LanguageModeling()
