"""The server's part in a real TensorBoard: all probes arrive, and nothing of ours can end it."""

import json
import subprocess
import sys
import urllib.parse
from importlib.metadata import distribution
from types import SimpleNamespace

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_subspace.tensorboard_tab.loader import Loader
from lightning_subspace.tensorboard_tab.page_files import STATIC, page_files
from lightning_subspace.tensorboard_tab.schema import PLUGIN, to_json
from tests.tensorboard_tab.runs import START, probes, write
from tests.tensorboard_tab.server import PREFIX, ROOT, SERVE, Server, environment

MANY = 1500  # more than the 1,000 scalars and the 10 tensors a tag that TensorBoard keeps of itself


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A long run, one that was resumed, one with two monitors, and one that is not ours."""
    folder = tmp_path_factory.mktemp("server") / "logs"
    write(folder / "long", range(MANY)).close()
    first = write(folder / "resumed", range(0, 1100, 100))
    first.close()
    [file] = (folder / "resumed").iterdir()
    file.rename(file.with_name("events.out.tfevents.1000000000.host.1.0"))
    write(folder / "resumed", range(500, 1700, 100), 2.0, start=START + 1e6).close()
    writer = write(folder / "two", range(0, 300, 100))
    write(None, range(0, 300, 100), writer=writer, name="other").close()
    foreign = EventFileWriter(str(folder / "foreign"))
    foreign.add_event(Event(wall_time=1.0, step=0, summary=Summary(value=[Summary.Value(tag="a", simple_value=1.0)])))
    foreign.close()
    return folder


@pytest.fixture(scope="module", params=["fast", "slow"])
def server(request, logs):
    """With the loader of Rust, and with that of Python."""
    made = Server(logs, *(["--load_fast=false"] if request.param == "slow" else []))
    made.wait_for(lambda: made.runs().get("long", {}).get("subspace/probes", {}).get("last") == MANY - 1)
    made.wait_for(lambda: {"long", "resumed", "two"} <= made.runs().keys())
    yield made
    made.close()


def test_all_probes_arrive_as_they_were_written(server):
    assert server.probes("long") == [json.loads(to_json(probe)) for probe in probes(range(MANY))]


def test_the_runs_that_are_ours_are_listed_with_their_schema(server):
    runs = server.runs()
    assert runs.keys() == {"long", "resumed", "two"}
    assert runs["two"] == {"subspace/probes": {"last": 200, "v": 1}, "other/probes": {"last": 200, "v": 1}}
    assert server.get("/data/plugins_listing")[PLUGIN]["enabled"] is True


def test_what_came_after_a_time_is_sent_alone(server):
    query = {"run": "long", "tag": "subspace/probes", "after": START + MANY - 3}
    answer = server.get(f"{PREFIX}/probes", **query)
    assert [probe["step"] for probe in answer["probes"]] == [MANY - 2, MANY - 1]
    assert answer["last"] == START + MANY - 1
    again = server.get(f"{PREFIX}/probes", **{**query, "after": answer["last"]})
    assert again == {"last": answer["last"], "probes": []}


def test_of_a_resumed_run_the_later_probes_are_the_last_of_their_steps(server):
    found = {probe["step"]: probe for probe in server.probes("resumed")}  # a loader may send a step twice
    assert sorted(found) == list(range(0, 1700, 100))
    assert found[1000]["metrics"]["sharpness"] == pytest.approx(2 * found[400]["metrics"]["sharpness"], rel=0.1)
    # What was written again has a later time, so a page that is open gets it.
    steps = server.steps("resumed", after=START + 1000)
    assert set(steps) == set(range(500, 1700, 100))


@pytest.mark.parametrize("where", [{"run": "none"}, {"run": "long", "tag": "none"}, {"run": "foreign", "tag": "a"}])
def test_what_is_not_there_is_empty(server, where):
    assert server.get(f"{PREFIX}/probes", **{"tag": "subspace/probes", **where})["probes"] == []


@pytest.mark.parametrize(
    "query",
    [{}, {"run": "a"}, {"tag": "a"}, *({"run": "a", "tag": "a", "after": after} for after in ("noon", "nan", "-inf"))],
    ids=str,
)
def test_a_wrong_request_is_told_to_be_one(server, query):
    status, _, body = server.fetch(f"{PREFIX}/probes", **query)
    assert status == 400
    assert "probes: expected run, tag and after" in body.decode()


@pytest.mark.parametrize("name", sorted(page_files()))
def test_a_file_of_the_page_is_served_as_it_is(server, name):
    status, kind, body = server.fetch(f"{PREFIX}/static/{name}")
    assert (status, body) == (200, (STATIC / name).read_bytes())
    assert kind.split(";")[0] == ("text/css" if name.endswith(".css") else "text/javascript")


@pytest.mark.parametrize(
    "name",
    [
        "none.js",
        "../plugin.py",
        "../static/index.js",
        "%2e%2e/plugin.py",
        "..%2fplugin.py",
        "package.json",
        "panels",
        "",
    ],
)
def test_no_other_file_is(server, name):
    status, _, body = server.fetch(f"{PREFIX}/static/{name}")
    if "static/index.js" in urllib.parse.unquote(name) and status == 200:
        assert body == (STATIC / "index.js").read_bytes()  # an address that was made shorter on its way
        return
    assert status == 404
    assert b"import" not in body


@pytest.mark.thorough  # `test_without_the_flag_ten_probes_are_kept` has what becomes of the flag
def test_what_the_user_says_of_samples_is_respected(logs):
    server = Server(logs, "--samples_per_plugin", "lightning_subspace=50,scalars=7", "--load_fast=false")
    try:
        server.wait_for(lambda: server.runs().get("long", {}).get("subspace/probes", {}).get("last") == MANY - 1)
        assert len(server.probes("long")) == 50
    finally:
        server.close()


def test_without_data_there_is_no_tab(tmp_path):
    (tmp_path / "logs").mkdir()
    server = Server(tmp_path / "logs", "--load_fast=false", has_data=False)
    try:
        listing = server.get("/data/plugins_listing")
        assert listing[PLUGIN]["enabled"] is False
        write(tmp_path / "logs" / "a", [0]).close()
        server.wait_for(lambda: server.get("/data/plugins_listing")[PLUGIN]["enabled"])
    finally:
        server.close()


def test_a_plugin_that_cannot_be_loaded_leaves_tensorboard_alive(logs):
    server = Server(logs, "--load_fast=false", broken="load", has_data=False)
    try:
        listing = server.get("/data/plugins_listing")
        assert PLUGIN not in listing
        assert listing.keys() >= {"scalars", "images"}
    finally:
        server.close()


def test_flags_that_are_unlike_tensorboards_leave_it_alive(logs):
    server = Server(logs, "--load_fast=false", broken="samples")
    try:
        assert server.probes("two")
    finally:
        server.close()


def test_without_the_flag_ten_probes_are_kept():
    """That all probes arrive is due to `fix_flags`: broken on purpose, the test of it fails."""
    flags = SimpleNamespace(samples_per_plugin={"scalars": 7})
    Loader().fix_flags(flags)
    assert flags.samples_per_plugin == {"scalars": 7, PLUGIN: 0}
    mine = SimpleNamespace(samples_per_plugin={PLUGIN: 50})
    Loader().fix_flags(mine)
    assert mine.samples_per_plugin == {PLUGIN: 50}
    none = SimpleNamespace(samples_per_plugin=None)
    Loader().fix_flags(none)
    assert none.samples_per_plugin == {PLUGIN: 0}


@pytest.mark.thorough  # of the tests
def test_broken_on_purpose_without_the_flag(logs):
    server = Server(logs, "--load_fast=false", broken="flags")
    try:
        server.wait_for(lambda: server.runs().get("long", {}).get("subspace/probes", {}).get("last") == MANY - 1)
        with pytest.raises(AssertionError):
            test_all_probes_arrive_as_they_were_written(server)
        assert len(server.probes("long")) == 10
    finally:
        server.close()


@pytest.mark.thorough  # of TensorBoard
def test_two_plugins_of_one_name_are_what_tensorboard_itself_refuses(logs):
    """So the name is a long one. TensorBoard names it before it serves anything."""
    command = [sys.executable, str(SERVE), "second", "--logdir", str(logs), "--port", "0", "--load_fast=false"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(ROOT))
    assert done.returncode != 0
    assert "Duplicate plugins for name lightning_subspace" in done.stderr


def test_nothing_heavy_is_imported_with_the_plugin():
    heavy = ("torch", "lightning", "matplotlib", "numpy", "lightning_subspace.report", "lightning_subspace.callbacks")
    script = (
        "import sys; from tensorboard.plugins import base_plugin; from tensorboard import plugin_util\n"
        "from tensorboard.data import provider; from tensorboard.backend import http_util\n"
        "before = set(sys.modules)\n"
        "import lightning_subspace.tensorboard_tab.loader, lightning_subspace.tensorboard_tab.plugin\n"
        f"print([name for name in {heavy} if name in set(sys.modules) - before])\n"
        "print([name for name in set(sys.modules) - before if name.startswith('lightning_subspace.')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    found, own = done.stdout.splitlines()
    assert found == "[]"
    assert all(name.startswith("lightning_subspace.tensorboard_tab") for name in eval(own))


def test_the_entry_point_is_declared_and_can_be_loaded():
    points = distribution("lightning-subspace").entry_points.select(group="tensorboard_plugins")
    if not points:
        pytest.skip("the package was installed before it had a tab: install it again")
    [point] = points
    assert (point.name, point.load()) == (PLUGIN, Loader)
