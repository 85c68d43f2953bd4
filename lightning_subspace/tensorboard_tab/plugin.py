"""Routes of the server: files, runs, and probes of a run.

No number is computed here.
"""

from __future__ import annotations

import json
import math
from typing import Any

from tensorboard import errors, plugin_util  # type: ignore[import-untyped]
from tensorboard.backend import http_util  # type: ignore[import-untyped]
from tensorboard.data import provider  # type: ignore[import-untyped]
from tensorboard.plugins import base_plugin  # type: ignore[import-untyped]
from werkzeug import wrappers

from lightning_subspace.tensorboard_tab.page_files import TYPES, page_files
from lightning_subspace.tensorboard_tab.schema import PLUGIN, SCHEMA

ASKED = "probes: expected run, tag and after, a time,"
MOST = 100_000  # probes that are sent of a run


class SubspacePlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """Serves the tab.

    Args:
        context: of one TensorBoard, with the provider of its data.
    """

    plugin_name = PLUGIN

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider
        # A fixed set: no path of a request is ever looked up on the disk.
        self._files = page_files()

    def is_active(self) -> bool:
        """Whether there are data beyond those of its own name.

        TensorBoard asks its provider by the plugin's name before it asks this.
        """
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Name of the tab, and where its page begins."""
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="Subspace")

    def get_plugin_apps(self) -> dict[str, Any]:
        """The three routes."""
        return {"/static/*": self._serve_file, "/runs": self._serve_runs, "/probes": self._serve_probes}

    @wrappers.Request.application  # type: ignore[arg-type]
    def _serve_file(self, request: wrappers.Request) -> Any:
        name = request.path.rsplit("/static/", 1)[-1]
        file = self._files.get(name)
        if file is None:
            raise errors.NotFoundError(f"static: expected a file of the tab, got {name!r}.")
        return http_util.Respond(request, file.read_bytes(), TYPES[file.suffix])

    @wrappers.Request.application  # type: ignore[arg-type]
    def _serve_runs(self, request: wrappers.Request) -> Any:
        """Tags by run, each with its schema and last step."""
        found = self._provider.list_tensors(
            plugin_util.context(request.environ),
            experiment_id=plugin_util.experiment_id(request.environ),
            plugin_name=PLUGIN,
        )
        runs = {
            run: {tag: {"last": of.max_step, "v": _schema(of.plugin_content)} for tag, of in tags.items()}
            for run, tags in found.items()
        }
        return http_util.Respond(request, {"runs": runs, "v": SCHEMA}, "application/json")

    @wrappers.Request.application  # type: ignore[arg-type]
    def _serve_probes(self, request: wrappers.Request) -> Any:
        """Probes of a run that were written after a time.

        Their texts are put together to one array, and none is parsed.

        By time and not by step, since a run that is resumed writes earlier steps again.

        Raises:
            InvalidArgumentError: for a request without a run or a tag, or with a time that is none.
        """
        try:
            run, tag, after = request.args["run"], request.args["tag"], float(request.args.get("after", 0.0))
        except (KeyError, ValueError) as error:
            raise errors.InvalidArgumentError(f"{ASKED} got {error!r}.") from error
        if not math.isfinite(after):  # a word that JSON does not have, and the answer tells the time
            raise errors.InvalidArgumentError(f"{ASKED} got {after}.")
        found = self._provider.read_tensors(
            plugin_util.context(request.environ),
            experiment_id=plugin_util.experiment_id(request.environ),
            plugin_name=PLUGIN,
            downsample=MOST,
            run_tag_filter=provider.RunTagFilter(runs=[run], tags=[tag]),
        )
        data = [datum for datum in found.get(run, {}).get(tag, []) if datum.wall_time > after]
        last = max((datum.wall_time for datum in data), default=after)
        body = b'{"last":%r,"probes":[' % last + b",".join(datum.numpy.item() for datum in data) + b"]}"
        return http_util.Respond(request, body, "application/json")


def _schema(content: bytes) -> int | None:
    try:
        return int(json.loads(content)["v"])
    except (ValueError, KeyError, TypeError):
        return None
