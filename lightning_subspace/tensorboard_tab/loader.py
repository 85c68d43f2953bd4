"""Entry point of TensorBoard's plugins.

TensorBoard ends where this module or `fix_flags` raises, and goes on where `load` does. So the one imports nothing but
a base class of TensorBoard's, and the plugin itself is imported in the other.
"""

from __future__ import annotations

from typing import Any

from tensorboard.plugins import base_plugin  # type: ignore[import-untyped]

from lightning_subspace.tensorboard_tab.schema import PLUGIN


class Loader(base_plugin.TBLoader):  # type: ignore[misc]
    """Makes the plugin, and has TensorBoard keep every probe."""

    def fix_flags(self, flags: Any) -> None:
        """Keep all tensors of the tab, not ten a tag.

        Ten is what TensorBoard keeps of a plugin that it does not know.
        """
        try:
            samples = dict(flags.samples_per_plugin or {})
            samples.setdefault(PLUGIN, 0)  # 0: all; what the user asks for stays
            flags.samples_per_plugin = samples
        except Exception:  # of any kind: one that leaves here would end TensorBoard
            return

    def load(self, context: Any) -> base_plugin.TBPlugin:
        """The plugin, for one TensorBoard."""
        from lightning_subspace.tensorboard_tab.plugin import SubspacePlugin

        return SubspacePlugin(context)
