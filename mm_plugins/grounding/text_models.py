"""Checks that the text models of grounding detectors, and of MMPretrain's, can be loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from plugin_core.errors import ArgumentError

_FETCH = (
    "Fetch it on a machine with a network, by `hf download google-bert/bert-base-uncased "
    "--local-dir bert-base-uncased` for the published models"
)


def check_pretrained(name: str, setting: str) -> None:
    """Check that a text model can be loaded by its name or folder; raises ValueError."""
    try:
        from transformers import AutoConfig
    except ImportError:
        return  # MMDetection says what to install
    with text_model_is_there(name, setting):
        AutoConfig.from_pretrained(name)


@contextmanager
def text_model_is_there(name: Any, setting: str) -> Iterator[None]:
    """Say what to fetch where loading a text model fails."""
    try:
        yield
    except (OSError, ValueError) as error:  # of transformers
        if not _is_missing(error):
            raise
        raise ValueError(
            f"{setting}: the text model {name!r} cannot be loaded "
            f"({' '.join(str(error).split())}). {_FETCH}, and name its folder in the config's "
            "lang_model_name, or else in model.language_model.name, of GLIP also in "
            "model.bbox_head.lang_model_name, and in tokenizer_name of RandomSamplingNegPos"
        ) from error


@contextmanager
def tokenizer_is_there(tokenizer: Mapping[str, Any]) -> Iterator[None]:
    """Say what to fetch where a model of MMPretrain cannot load its ``tokenizer``.

    Raises:
        ArgumentError: names the tokenizer's setting.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if not _is_missing(error):
            raise
        raise ArgumentError("tokenizer.name_or_path", describe_missing(tokenizer, error)) from error


def describe_missing(tokenizer: Mapping[str, Any], error: Exception) -> str:
    """Say what MMPretrain's setting ``tokenizer`` must name, where loading it raised an error."""
    name = tokenizer.get("name_or_path", tokenizer.get("pretrained_model_name_or_path"))
    return (
        f"must be the folder of a text model, got {name!r}, which cannot be loaded "
        f"({' '.join(str(error).split())}). {_FETCH}, and name its folder here"
    )


def _is_missing(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__name__ == "HFValidationError"
