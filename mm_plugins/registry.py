"""The scope ``mm_plugins``: ``_base_ = "mm_plugins::ida/…"`` names a config of this project.

mmengine marks what such a base builds with the base's package, and looks for it in the registries
of that scope. These registries hold nothing themselves: a lookup goes on to MMDetection's.
"""

import mmdet.registry
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import Registry

SCOPE = "mm_plugins"


def _add_scope() -> None:
    # mmengine refuses bases of packages that are not in this table.
    MODULE2PACKAGE[SCOPE] = SCOPE
    for registry in vars(mmdet.registry).values():
        if isinstance(registry, Registry):
            Registry(registry.name, parent=registry, scope=SCOPE)


_add_scope()
