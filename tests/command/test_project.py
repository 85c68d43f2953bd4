"""A project is built as it was trained: from what LightningCLI has saved, and what it has not."""

import contextlib
import io
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from lightning_subspace import read_history
from lightning_subspace._lightning import DummyLogger
from lightning_subspace.command import project
from lightning_subspace.command.main import main
from lightning_subspace.command.project import Configuration, build
from tests.command import small_project
from tests.command.small_project import CLASSES, HERE, LR, Data, FixedCLI, Net
from tests.processes import run
from tests.thorough import usual

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's, about Lightning's use of it
HYPERPARAMETERS = {"width": 3, "classes": CLASSES}


def options(namespace):
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    return {"logger": DummyLogger(), "callbacks": [], "max_epochs": 1, **quiet}


def write(folder, **sections):
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def test_what_was_saved_is_read(trained):
    made = build(Configuration([trained / "config.yaml"]), HYPERPARAMETERS, options)
    assert (type(made.module).__name__, made.module.hparams["classes"], made.data.examples) == ("Net", CLASSES, 48)
    assert type(made.trainer.accelerator).__name__ == "CPUAccelerator"
    assert made.trainer.max_epochs == 1  # ours, not the file's
    optimizer = made.module.configure_optimizers()
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (torch.optim.SGD, LR)
    assert [type(callback).__name__ for callback in made.trainer.callbacks] == []  # its ModelCheckpoint is left out


def test_a_linked_argument_is_not_in_the_file_and_comes_from_the_checkpoint_or_the_command_line_of_the_user(trained):
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert "classes" not in saved["model"]["init_args"]
    files = [trained / "config.yaml"]
    assert build(Configuration(files), {}, options).module.hparams["classes"] == 2  # the default: nothing tells it
    linking = Configuration(files, cli=f"{HERE}LinkingCLI")
    for hyperparameters in ({}, HYPERPARAMETERS):
        assert build(linking, hyperparameters, options).module.hparams["classes"] == CLASSES


def test_what_stands_in_the_file_comes_before_the_checkpoint(tmp_path):
    file = write(
        tmp_path,
        model={"class_path": f"{HERE}Net", "init_args": {"width": 5}},
        data={"class_path": f"{HERE}Data"},
    )
    made = build(Configuration([file], ["--data.init_args.examples=8"]), HYPERPARAMETERS, options)
    assert (made.module.hparams["width"], made.module.hparams["classes"], made.data.examples) == (5, CLASSES, 8)


def test_classes_that_the_file_does_not_name_are_named(tmp_path):
    file = write(tmp_path, model={"width": 5}, data={"examples": 8})
    with pytest.raises(ValueError, match=r"--model: expected the class path of the LightningModule, as the config"):
        build(Configuration([file]), {}, options)
    with pytest.raises(ValueError, match=r"--data: expected the class path of the LightningDataModule, as the config"):
        build(Configuration([file], model=f"{HERE}Net"), {}, options)
    named = Configuration([file], model=f"{HERE}Net", data=f"{HERE}Data")
    made = build(named, HYPERPARAMETERS, options)
    assert (type(made.module), type(made.data), made.data.examples) == (Net, Data, 8)
    assert (made.module.hparams["width"], made.module.hparams["classes"]) == (5, CLASSES)


def test_a_command_line_with_links_and_an_optimizer_of_its_own(tmp_path, monkeypatch):
    run = small_project.train(tmp_path, FixedCLI, "", Net, Data, epochs=1, options=["--optimizer.lr=0.25"])
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert ("class_path" in saved["optimizer"], "classes" in saved["model"]) == (False, False)
    named = Configuration([run / "config.yaml"], model=f"{HERE}Net", data=f"{HERE}Data", cli=f"{HERE}FixedCLI")
    for hyperparameters in ({}, HYPERPARAMETERS):
        made = build(named, hyperparameters, options)
        assert made.module.hparams["classes"] == CLASSES
    optimizer = made.module.configure_optimizers()
    assert (type(optimizer), optimizer.param_groups[0]["lr"]) == (torch.optim.Adam, 0.25)


def test_devices_are_those_of_torchrun_or_one(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert project._processes("ddp") == {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert project._processes("deepspeed") == {"devices": 2, "num_nodes": 2, "strategy": "ddp"}

    class ModelParallelStrategy:
        pass

    own = ModelParallelStrategy()
    assert project._processes(own)["strategy"] is own


def test_a_package_that_is_missing_is_named(monkeypatch, trained):
    find = project.importlib.util.find_spec
    monkeypatch.setattr(
        project.importlib.util, "find_spec", lambda name: None if name == "jsonargparse" else find(name)
    )
    with pytest.raises(ValueError, match=r"measure: expected jsonargparse, .* pip install 'lightning-subspace\[cli\]'"):
        build(Configuration([trained / "config.yaml"]), {}, options)


def test_classes_of_a_script_that_was_run_are_found_in_its_file(tmp_path, monkeypatch):
    (tmp_path / "train_small.py").write_text(f"from {small_project.__name__} import Net, Data\n")
    file = write(tmp_path, model={"class_path": "__main__.Net"}, data={"class_path": "__main__.Data"})
    with pytest.raises(ValueError, match=r"model: expected .*, got '__main__.Net'; pass --script with the file that"):
        build(Configuration([file]), {}, options)
    main = sys.modules["__main__"]
    for name in ("Net", "Data"):
        monkeypatch.setattr(main, name, None, raising=False)  # and taken out again
    monkeypatch.setattr(sys, "path", sys.path[:])
    made = build(Configuration([file], script=tmp_path / "train_small.py"), {}, options)
    assert (type(made.module), type(made.data)) == (Net, Data)
    with pytest.raises(ValueError, match=r"--script: expected a file of Python that can be imported \(.*\), got '"):
        build(Configuration([file], script=tmp_path / "nothing.py"), {}, options)


@pytest.mark.parametrize("text", ["fit: {model: {class_path: a.B}}", "- a list", "a: [1", ""])
def test_a_file_that_is_no_configuration_is_told(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="--config: expected"):
        build(Configuration([tmp_path / "config.yaml"]), {}, options)


def test_a_configuration_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"--config: expected a file, got '.*none\.yaml' \(No such file"):
        Configuration([tmp_path / "none.yaml"]).sections()


def test_what_cannot_be_imported_is_told(trained):
    with pytest.raises(ValueError, match=r"--cli: expected the path of what can be imported \(.*\), got 'nowhere.CLI'"):
        build(Configuration([trained / "config.yaml"], cli="nowhere.CLI"), {}, options)


def by_the_console_script(*arguments):
    """Exit code and output of one that has no current folder on its path."""
    script = "import sys; sys.path.remove(''); sys.path.insert(0, sys.argv.pop(1)); "
    script += "from lightning_subspace.command.main import main; sys.exit(main())"
    command = [sys.executable, "-c", script, str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def by_a_fork(*arguments):
    """The same with what this process has imported, which takes most of the time."""

    def console_script():
        sys.path[:] = [str(ROOT), *(path for path in sys.path if path not in ("", str(ROOT), os.getcwd()))]
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as printed:
            warnings.simplefilter("ignore")
            return main(list(arguments)), printed.getvalue()

    [answer] = run(console_script, 1, group=False)
    return answer


@pytest.mark.parametrize("start", usual([by_a_fork], thorough=[by_the_console_script]))
def test_modules_of_the_current_folder_are_found(tmp_path, start, monkeypatch):
    """And a whole run."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import torch
            from pytorch_lightning import LightningModule
            from torch.utils.data import DataLoader, TensorDataset


            class Net(LightningModule):
                def __init__(self, width: int):
                    super().__init__()
                    self.layers = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Tanh())

                def training_step(self, batch, index):
                    return self.layers(batch[0]).square().mean()

                def configure_optimizers(self):
                    return torch.optim.SGD(self.parameters(), lr=0.1)

                def train_dataloader(self):
                    return DataLoader(TensorDataset(torch.arange(16.0).reshape(8, 2) / 16), batch_size=4)
            """
        )
    )
    write(tmp_path, model={"class_path": "mine.Net", "init_args": {"width": 2}}, trainer={"accelerator": "cpu"})
    state = {"layers.0.weight": torch.eye(2), "layers.0.bias": torch.zeros(2)}
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "a.ckpt")
    monkeypatch.chdir(tmp_path)
    code, said = start("measure", "--config", "config.yaml", "--ckpt", "a.ckpt", "--k", "1")
    assert code == 0, said
    [record] = read_history(tmp_path / "subspace" / "history.ckpt")
    assert record.step == 7
    assert "sharpness_over_threshold" not in record.metrics  # the checkpoint has weights alone
    assert "in subspace/history.ckpt; lightning-subspace show" in said
