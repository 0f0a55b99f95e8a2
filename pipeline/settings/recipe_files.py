"""Recipe files: finds them by name or path, and resolves `extends` and variants."""

import difflib
import os
from pathlib import Path

from omegaconf import OmegaConf

from pipeline.runtime.errors import UserError, did_you_mean

# package data if installed, the top folder in a checkout
RECIPES = next(path for up in (1, 2) if (path := Path(__file__).resolve().parents[up] / "recipes").is_dir())


def available() -> list[str]:
    """The names of the project's recipes and their variants."""
    names = []
    for path in sorted(RECIPES.glob("*.yaml")):
        names += [path.stem, *(f"{path.stem}_{variant}" for variant in _read(path)[1])]
    return names


def layers(name: str) -> list[dict]:
    """A recipe and all that it extends, the base first; raises `UserError` if one is missing or not readable.

    `name`: a recipe's name or a path to a .yaml, with `_VARIANT` appended to choose a variant: llama7b_2of4 is the variant
    2of4 of llama7b.yaml.
    """
    return _find(name)[0]


def _find(name: str, folder: Path = RECIPES, seen: tuple[Path, ...] = ()) -> tuple[list[dict], dict[str, dict]]:
    """The layers of a recipe, and its variants by name."""
    candidates = [folder / f"{name}.yaml", RECIPES / f"{name}.yaml"]
    if name.endswith(".yaml"):
        candidates = [Path(os.path.expanduser(name)).resolve()]
    if path := next((path.resolve() for path in candidates if path.is_file()), None):
        return _read(path, seen)
    for path in candidates:
        parts = path.stem.split("_")
        for i in range(len(parts) - 1, 0, -1):
            base, variant = path.with_stem("_".join(parts[:i])), "_".join(parts[i:])
            base_layers, variants = _read(base, seen) if base.is_file() else ([], {})
            if variant in variants:
                return [*base_layers, variants[variant]], variants
            if variants:
                raise UserError(
                    f"recipe '{base.stem}' has no variant '{variant}'{did_you_mean(variant, list(variants))}"
                )
    if name.endswith((".yaml", ".yml")) or "/" in name:
        hint = "" if name.endswith(".yaml") else " (the path of a recipe ends with .yaml)"
        raise UserError(f"recipe={name}: no such file{hint}")
    close = difflib.get_close_matches(name, available(), n=1)
    raise UserError(
        f"no recipe '{name}': " + (f"did you mean '{close[0]}'?" if close else "`espalier recipes` lists all")
    )


def _read(path: Path, seen: tuple[Path, ...] = ()) -> tuple[list[dict], dict[str, dict]]:
    """As `_find`, for an existing file."""
    if path in seen:
        raise UserError(f"recipe '{path.stem}' extends itself: {' -> '.join(p.stem for p in [*seen, path])}")
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml's errors share no base class with omegaconf's
        raise UserError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(layer, dict):
        raise UserError(f"{path} is not a recipe: write it as lines of key: value")
    base, own_variants = layer.pop("extends", None), layer.pop("variants", None) or {}
    if not isinstance(own_variants, dict) or not all(isinstance(variant, dict) for variant in own_variants.values()):
        raise UserError(f"variants of {path}: write {{name: {{key: value}}}}")
    base_layers, variants = _find(base, path.parent, (*seen, path)) if base else ([], {})
    return [*base_layers, layer], variants | {str(name): variant for name, variant in own_variants.items()}
