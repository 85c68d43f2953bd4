"""Warnings are errors; what Lightning itself cannot help saying is let through here, each with its reason."""

import pytest

LIGHTNING_SAYS = (
    # lightning 2.6 asks torch 2.14's pytree for leaves in the old way
    "ignore:.*isinstance\\(treespec, LeafSpec\\).*:FutureWarning",
    # the tests load in this process, so that a probe could disturb the loading
    "ignore:The '.*dataloader' does not have many workers",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in LIGHTNING_SAYS:
        config.addinivalue_line("filterwarnings", line)
