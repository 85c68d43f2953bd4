"""Start a TensorBoard with the tab: also from a copy of the package, or with the plugin broken on purpose.

    python serve.py BREAK ARGUMENTS...

The plugin is added where the package that is installed does not declare it yet.
"""

import sys

from tensorboard import default, program

from lightning_subspace.tensorboard_tab.loader import Loader


class NoFlags(Loader):
    """Without what has TensorBoard keep every probe."""

    def fix_flags(self, flags):
        pass


class NoPlugin(Loader):
    """An exception where the plugin itself is loaded."""

    def load(self, context):
        raise ImportError("the plugin cannot be imported")


class NoSamples(Loader):
    """Flags that are nothing like TensorBoard's."""

    def fix_flags(self, flags):
        super().fix_flags(object())


class Second(Loader):
    """Another plugin of the same name."""


LOADERS = {"none": [Loader], "flags": [NoFlags], "load": [NoPlugin], "samples": [NoSamples], "second": [Loader, Second]}


def main(broken, *arguments):
    known = [plugin for plugin in default.get_plugins() if plugin is not Loader]
    board = program.TensorBoard(plugins=known + LOADERS[broken])
    board.configure(argv=["tensorboard", *arguments])
    return board.main()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
