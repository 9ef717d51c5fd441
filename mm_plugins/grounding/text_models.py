"""Checks that the text models of grounding detectors can be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
        if isinstance(error, ValueError) and type(error).__name__ != "HFValidationError":
            raise
        raise ValueError(
            f"{setting}: the text model {name!r} cannot be loaded "
            f"({' '.join(str(error).split())}). Fetch it on a machine with a network, by "
            "`hf download google-bert/bert-base-uncased --local-dir "
            "bert-base-uncased` for the published models, and name its folder in the config's "
            "lang_model_name, or else in model.language_model.name, of GLIP also in "
            "model.bbox_head.lang_model_name, and in tokenizer_name of RandomSamplingNegPos"
        ) from error
