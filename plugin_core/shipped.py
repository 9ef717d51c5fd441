"""What an installation holds beside the packages: configs, and the scripts of ``tools/``.

In a checkout ``d2_plugins/configs``, ``mm_plugins/.mim/configs`` and ``plugin_core/tools`` link to
the folders at the top. A wheel has the files themselves.
"""

from __future__ import annotations

import posixpath
from pathlib import Path

_PACKAGES = Path(__file__).resolve().parent.parent
#: Folder of the scripts
TOOLS = _PACKAGES / "plugin_core" / "tools"
# ".mim" is where OpenMMLab's packages have theirs.
_CONFIGS = {"d2_plugins://": "d2_plugins/configs", "mm_plugins::": "mm_plugins/.mim/configs"}


def shipped_config(config: str) -> str:
    """Return the path of a config that this project ships, or ``config`` as it is.

    Args:
        config: ``d2_plugins://`` or ``mm_plugins::`` and a name below ``configs/d2`` or
            ``configs/mm``; ``mm_plugins::mmpretrain/…`` is below ``configs/mmpretrain``. Anything
            else is returned unchanged.

    Raises:
        FileNotFoundError: if the project has no such config.
    """
    for prefix, folder in _CONFIGS.items():
        if config.startswith(prefix):
            path = _PACKAGES / folder / posixpath.normpath(config[len(prefix) :])
            if not path.is_file():
                raise FileNotFoundError(f"{config}: there is no such config; see configs/README.md")
            return str(path)
    return config
