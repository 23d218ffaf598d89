"""Every method of the comparison; importing this package registers them all in `moa.methods.METHODS`."""

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
