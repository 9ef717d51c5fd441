"""The published methods, one file each; PyTorch only. Importing this registers block plugins."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
