"""Opening a config of either framework, which is imported only then."""

from __future__ import annotations

import importlib

from plugin_core.inspection.attention_maps import Detector
from plugin_core.inspection.cost import Report

CLASSIFIER = "classifier"
_DETECTORS = {
    "d2_plugins": ("d2_plugins.visualization", "Detectron2Detector"),
    "mm_plugins": ("mm_plugins.visualization", "MMDetDetector"),
    CLASSIFIER: ("plugin_core.inspection.classifier", "Classifier"),
}


def count(
    side: str, config: str, image_size: tuple[int, int] | None, *, activations: bool = True
) -> Report:
    """Count the cost of a config's detector.

    Args:
        side: package of its framework, as :func:`side_of` names it.
        config: of the detector.
        image_size: (height, width) in pixels; the config's test size by default.
        activations: count these as well, which takes as long again.

    Raises:
        ValueError: if that is not possible; the message begins with the config.
    """
    try:
        analysis = importlib.import_module(f"{side}.analysis")
        return analysis.analyze(analysis.load_config(config), image_size, activations=activations)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{config}: {error}") from error
    except Exception as error:  # of a config's own code, or a model that takes no image like this
        raise ValueError(f"{config}: {error!r}") from error


def load(side: str, config: str, weights: str, trust: bool = False) -> Detector:
    """Build a trained detector.

    Args:
        side: package of its framework, or ``CLASSIFIER``.
        config: of the detector.
        weights: path of its checkpoint.
        trust: let the checkpoint run what it asks to run.

    Raises:
        ValueError: if that is not possible; the message begins with the config.
    """
    try:
        module, name = _DETECTORS[side]
        return getattr(importlib.import_module(module), name)(config, weights, trust=trust)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{config}: {error}") from error
    except Exception as error:  # of a config's own code
        raise ValueError(f"{config}: {error!r}") from error
