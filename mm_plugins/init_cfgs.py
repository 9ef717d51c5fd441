"""Which weights the ``init_cfg``s of a config begin with."""

from __future__ import annotations

from typing import Any

from mmengine.model import PretrainedInit


def pretrained(init_cfg: Any) -> list[dict[str, Any]]:
    """Keep the parts of an ``init_cfg``, a dict or a list of them, that load a checkpoint."""
    parts = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    kinds = ("Pretrained", PretrainedInit)
    return [part for part in parts if isinstance(part, dict) and part.get("type") in kinds]
