"""The package optim under the name that it has outside this repository.

In a checkout both names are one module object, and so are their submodules: what is registered
under one name is known under the other. convert is left out, because python -m nanodual.convert
runs it.
"""

import sys
from importlib import import_module
from pkgutil import iter_modules

import optim

for _module in iter_modules(optim.__path__):
    if _module.name != "convert":
        sys.modules[f"nanodual.{_module.name}"] = import_module(f"optim.{_module.name}")
sys.modules["nanodual"] = optim
