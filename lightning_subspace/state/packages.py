"""Packages that classes come from: a user's, and others."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_subspace.state.per_class import per_class

# Objects of these packages, and of classes derived from theirs, manage training itself: they are not followed.
TRAINING = frozenset({"lightning", "pytorch_lightning", "lightning_fabric", "torch"})
FOREIGN = TRAINING | sys.stdlib_module_names
ITSELF = __name__.split(".")[0]
# Objects that only write down what they are told, each in a way of its own.
WRITERS = frozenset(
    {"aim", "clearml", "comet_ml", "loguru", "mlflow", "neptune", "rich", "structlog", "tensorboard", "tensorboardX"}
    | {"tqdm", "wandb"}
)

# The standard library's that run a program, write what happens down, or never change: the others hold state.
MACHINERY = frozenset(
    {"__future__", "_frozen_importlib", "_frozen_importlib_external", "_io", "_thread", "_weakref", "_weakrefset"}
    | {"abc", "ast", "asyncio", "bdb", "builtins", "cProfile", "concurrent", "contextvars", "ctypes", "datetime"}
    | {"enum", "fractions", "functools", "gc", "importlib", "inspect", "io", "ipaddress", "itertools", "logging"}
    | {"multiprocessing", "numbers", "operator", "os", "pathlib", "pdb", "pkgutil", "posix", "profile", "queue", "re"}
    | {"runpy", "selectors", "signal", "socket", "socketserver", "ssl", "string", "subprocess", "sys", "time"}
    | {"traceback", "tracemalloc", "types", "typing", "uuid", "warnings", "weakref", "zoneinfo"}
)


def package(cls: type) -> str:
    """The package that a class was defined in."""
    return str(cls.__module__).split(".")[0]


def package_names(value: Any) -> frozenset[str]:
    """Those of an object's class and of all that it derives from."""
    return package_names_of(type(value))


@per_class
def package_names_of(cls: type) -> frozenset[str]:
    """The same of a class."""
    return frozenset(map(package, cls.__mro__))


def is_ours(value: Any) -> bool:
    """Whether an object is of a class here, or of one derived."""
    return ITSELF in package_names(value)


def packages_of(objects: Iterable[object]) -> frozenset[str]:
    """Packages of the classes of some objects, without `FOREIGN` ones."""
    return frozenset().union(*map(package_names, objects)) - FOREIGN


def own_places(module: nn.Module) -> tuple[list[type], list[dict[str, Any]]]:
    """A module's own classes, and the globals of their files."""
    kinds = {type(m) for m in module.modules()}
    classes = {cls for kind in kinds for cls in kind.__mro__ if package(cls) not in FOREIGN}
    files = {cls.__module__ for cls in classes}
    return list(classes), [vars(sys.modules[name]) for name in files if name in sys.modules]


def own_globals(module: nn.Module) -> list[Any]:
    """Values in a module's classes and in the files of these classes."""
    classes, files = own_places(module)
    return [value for place in (*map(vars, classes), *files) for value in list(place.values())]
