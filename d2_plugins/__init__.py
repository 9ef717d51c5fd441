"""The plugins in Detectron2. Importing this package registers the backbone builders."""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "d2_plugins needs Detectron2: build it as its own installation guide says, or, without "
        "its compiled operators, `pip install ./packaging/detectron2` in a checkout of this project"
    ) from error

from d2_plugins import (  # noqa: F401  # only for registration
    attention_mask_consistency,
    backbones,
    mmdet_bridge,
    roi_heads,
)
from d2_plugins.config import add_plugin_config, merge_config

__all__ = ["add_plugin_config", "merge_config"]
