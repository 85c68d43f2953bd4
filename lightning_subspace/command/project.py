"""A user's project, built by LightningCLI from its configuration.

The module, its data and the optimizer are built as for training, in the same order and under the same seed. Of the
trainer's section is taken what decides about devices, precision and data; callbacks, loggers and limits of a fit are
not. Arguments that LightningCLI links are not in the files that it saves: they are read from the checkpoint, where the
module has kept its hyperparameters.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from lightning_subspace._arguments import wrong

Options: TypeAlias = Callable[[str], Mapping[str, Any]]

# Of the section `trainer`; what else is there belongs to a fit.
KEPT = ("accelerator", "precision", "limit_train_batches", "overfit_batches", "sync_batchnorm")
STRATEGIES = {"DDPStrategy", "ModelParallelStrategy"}
FIT = {"ckpt_path", "weights_only"}  # arguments of `fit`, which a saved configuration has beside those of its classes


@dataclass(frozen=True)
class Project:
    """What training would begin with.

    Attributes:
        trainer: with the callbacks that it was given.
        module: a LightningModule.
        data: a LightningDataModule; None where the module has its own loaders.
    """

    trainer: Any
    module: Any
    data: Any


@dataclass(frozen=True)
class Configuration:
    """Where a project is described.

    Attributes:
        files: in YAML; a later one takes precedence.
        overrides: arguments of LightningCLI that take precedence over them.
        cli: class path of the user's own LightningCLI.
        model: class path of the module, where the files do not name it.
        data: class path of the data module, where the files do not name it.
        seed: where the files have none.
        script: the file that was run, where class paths begin with `__main__`.
    """

    files: Sequence[Path]
    overrides: Sequence[str] = ()
    cli: str | None = None
    model: str | None = None
    data: str | None = None
    seed: int = 0
    script: Path | None = None

    def sections(self) -> dict[str, Any]:
        """The sections of all files, as they stand there.

        Raises:
            ValueError: for a file that is no configuration, or cannot be read.
        """
        import yaml  # type: ignore[import-untyped]

        found: dict[str, Any] = {}
        for file in self.files:
            try:
                sections = yaml.safe_load(file.read_text(encoding="utf-8"))
            except OSError as error:
                raise ValueError(f"--config: expected a file, got {str(file)!r} ({error.strerror}).") from error
            except yaml.YAMLError as error:
                raise ValueError(f"--config: expected YAML, got {str(file)!r} ({error}).") from error
            if not isinstance(sections, dict):
                raise ValueError(f"--config: expected a configuration of LightningCLI in YAML, got {str(file)!r}.")
            found |= sections
        if "model" not in found and "fit" in found:
            raise ValueError(
                "--config: expected the sections of a run, got them under `fit`; pass the config.yaml that "
                "LightningCLI has saved beside the logs."
            )
        return found


def build(configuration: Configuration, hyperparameters: Mapping[str, Any], options: Options) -> Project:
    """Build a project.

    Args:
        configuration: where it is described.
        hyperparameters: of the module, as a checkpoint has them.
        options: of the trainer, for a namespace of Lightning; they take precedence.

    Raises:
        ValueError: for a configuration that does not name its classes, or a package that is missing.
        SystemExit: from LightningCLI, which has told what is wrong with the configuration.
    """
    require_package()
    _look_in(os.getcwd())
    if configuration.script is not None:
        _stand_in_for_main(configuration.script)
    sections = configuration.sections()
    classes = [_class_of(name, sections, getattr(configuration, name)) for name in ("model", "data")]
    namespace = _namespace(classes[0] or _imported("model", sections["model"]["class_path"]))
    base = importlib.import_module(f"{namespace}.cli").LightningCLI
    if configuration.cli is not None:
        base = _imported("--cli", configuration.cli)
    seed_everything = importlib.import_module(namespace).seed_everything
    seed_everything(configuration.seed, workers=True, verbose=False)  # where the configuration asks for no seed
    files = [part for file in configuration.files for part in ("--config", str(file))]
    with _no_arguments():
        cli = _measuring(base, hyperparameters, sections, partial(options, namespace))(
            *classes,
            save_config_callback=None,
            run=False,
            seed_everything_default=configuration.seed,
            subclass_mode_model=_names_class(sections.get("model")),
            subclass_mode_data=_names_class(sections.get("data")),
            args=[*files, *configuration.overrides],
        )
    return Project(cli.trainer, cli.model, cli.datamodule)


def require_package() -> None:
    """Refuse to go on without jsonargparse.

    Raises:
        ValueError: saying what to install.
    """
    if importlib.util.find_spec("jsonargparse") is None:
        raise ValueError(
            "measure: expected jsonargparse, by which LightningCLI reads a configuration, got none; "
            "pip install 'lightning-subspace[cli]'."
        )


def _namespace(cls: Any) -> str:
    names = [base.__module__ for base in getattr(cls, "__mro__", ())]
    is_old = any(name.split(".")[0] == "pytorch_lightning" for name in names)
    return "pytorch_lightning" if is_old else "lightning.pytorch"


def _class_of(name: str, sections: Mapping[str, Any], path: str | None) -> Any:
    """The class to be told; None where the section names it."""
    if path is not None:
        return _imported(f"--{name}", path)
    section = sections.get(name)
    if _names_class(section) or (name == "data" and section is None):
        return None
    kind = "LightningModule" if name == "model" else "LightningDataModule"
    raise ValueError(
        f"--{name}: expected the class path of the {kind}, as the configuration names none (no `class_path` under "
        f"`{name}`), got none; pass --{name} package.module.Class."
    )


def _names_class(section: Any) -> bool:
    return isinstance(section, Mapping) and "class_path" in section


def _imported(name: str, path: str) -> Any:
    """The object of a class path.

    Raises:
        ValueError: where there is none.
    """  # noqa: DOC501  # `wrong` makes one
    module, _, last = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError, ValueError) as error:
        place = "it is looked for where packages are installed, and in the current folder"
        if module == "__main__":
            place = "pass --script with the file that was run"
        raise wrong(name, f"the path of what can be imported ({error})", path, place) from error


def imported(name: str, path: str) -> Any:
    """What a path of the user's names, in the current folder too."""
    _look_in(os.getcwd())
    return _imported(name, path)


def _look_in(folder: str) -> None:
    """Look for modules there, too, before where packages are."""
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _stand_in_for_main(script: Path) -> None:
    """Let `__main__.Name` be what it was when the script was run."""
    _look_in(str(script.resolve().parent))
    try:
        module = importlib.import_module(script.stem)
    except ImportError as error:
        raise wrong("--script", f"a file of Python that can be imported ({error})", str(script)) from error
    names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    vars(sys.modules["__main__"]).update(names)


@contextmanager
def _no_arguments() -> Iterator[None]:
    """Hide our command line from LightningCLI, which would warn of it."""
    before = sys.argv
    sys.argv = before[:1]
    try:
        yield
    finally:
        sys.argv = before


def _measuring(
    base: Any,
    hyperparameters: Mapping[str, Any],
    sections: Mapping[str, Any],
    options: Callable[[], Mapping[str, Any]],
) -> Any:
    """The user's LightningCLI, whose trainer measures."""

    class Measuring(base):  # type: ignore[misc]
        def add_arguments_to_parser(self, parser: Any) -> None:
            super().add_arguments_to_parser(parser)
            for name in FIT:
                parser.add_argument(f"--{name}", type=Any, default=None)

        def parse_arguments(self, parser: Any, args: Any) -> None:
            super().parse_arguments(parser, args)
            if linked := _linked(sections.get("model"), self.model_class, hyperparameters):
                self.config: Any = parser.parse_object({"model": linked}, self.config)

        def before_instantiate_classes(self) -> None:
            super().before_instantiate_classes()
            for name, value in (("callbacks", None), ("logger", False), ("profiler", None), ("plugins", None)):
                self.config.trainer[name] = value

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            given = self.config_init.trainer
            kept = {name: given[name] for name in KEPT if given.get(name) is not None}
            return self.trainer_class(**{**kept, **_processes(given.get("strategy")), **options()})

    return Measuring


def _linked(section: Any, cls: Any, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that the files lack and the checkpoint has."""
    in_subclass_mode = _names_class(section)
    stated = section.get("init_args", {}) if in_subclass_mode else section
    if not isinstance(stated, Mapping):
        return {}
    cls = _imported("model", section["class_path"]) if in_subclass_mode else cls
    left = inspect.signature(cls).parameters.keys() - stated.keys()
    found = {name: value for name, value in hyperparameters.items() if name in left}
    return {"class_path": section["class_path"], "init_args": found} if found and in_subclass_mode else found


def _processes(strategy: Any) -> dict[str, Any]:
    """Devices and strategy: one process, or those of torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    local, world = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    is_known = any(base.__name__ in STRATEGIES for base in type(strategy).__mro__)
    return {"devices": local, "num_nodes": world // local, "strategy": strategy if is_known else "ddp"}
