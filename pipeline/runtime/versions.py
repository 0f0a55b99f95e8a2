"""The versions of the libraries that results depend on. They are in no stage's key."""

from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "transformers", "datasets", "lightning", "peft", "accelerate", "lm_eval")


def versions() -> dict[str, str]:
    """By library, without importing it."""
    return {name: version_of(name) for name in LIBRARIES}


def version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
