"""Tiny random image classifiers of several families, and images to give them."""

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "num_labels": 3}
WINDOWS = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4, "num_labels": 3, "image_size": 32}
SIZE = 32
FAMILIES = {
    "ViT": VIT | {"image_size": SIZE, "patch_size": 8},
    "DeiT": VIT | {"image_size": SIZE, "patch_size": 8},
    "Beit": VIT | {"image_size": SIZE, "patch_size": 8, "use_relative_position_bias": True},
    "Dinov2": VIT | {"image_size": SIZE, "patch_size": 8},
    "ConvNext": STAGES,
    "ConvNextV2": STAGES,
    "Swin": WINDOWS | {"patch_size": 2},
    "Swinv2": WINDOWS | {"patch_size": 2},
}
# of timm, with arguments of its constructors
TIMM = {
    "mixer_s16_224": {"img_size": SIZE},
    "vit_tiny_patch16_224": {"img_size": SIZE, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        **{"img_size": SIZE, "patch_size": 2, "window_size": 4, "embed_dim": 8},
        **{"depths": (2, 1), "num_heads": (1, 2)},
    },
}


def tiny(name: str, **changes) -> transformers.PreTrainedModel:
    """A classifier of three classes with weights that are all random: some families start a scale or a bias at zero."""
    kind, sizes = name, FAMILIES.get(name)
    if name in TIMM:
        pytest.importorskip("timm")
        kind, sizes = "TimmWrapper", {"architecture": name, "num_labels": 3, "model_args": TIMM[name]}
    config = getattr(transformers, f"{kind}Config")(**sizes | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.dim() > 1 else 0.2) / 2)
    return model


def pixels(count: int, seed: int = 0, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def picture(level: int, mode: str = "RGB", size: int = 40) -> Image.Image:
    """An image of two brightnesses, so that no two levels look alike."""
    levels = torch.full((size, size), level, dtype=torch.uint8)
    levels[: size // 4] = 255 - level
    return Image.fromarray(levels.numpy()).convert(mode)
