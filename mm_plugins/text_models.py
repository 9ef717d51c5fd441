"""The text models that grounding detectors read texts with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def text_model_is_there(model: Mapping[str, Any]) -> Iterator[None]:
    """Say what to fetch where a text model is missing."""
    try:
        yield
    except (OSError, ValueError) as error:  # of transformers
        if isinstance(error, ValueError) and type(error).__name__ != "HFValidationError":
            raise
        name = (model.get("language_model") or {}).get("name")
        raise ValueError(
            f"language_model.name: the text model {name!r} cannot be loaded ({error}). Fetch it on "
            "a machine with a network, by `hf download google-bert/bert-base-uncased --local-dir "
            "bert-base-uncased` for the published models, and name its folder in the config's "
            "lang_model_name, or else in model.language_model.name, of GLIP also in "
            "model.bbox_head.lang_model_name, and in tokenizer_name of RandomSamplingNegPos"
        ) from error
