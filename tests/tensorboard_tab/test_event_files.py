"""Event files that are read without a TensorBoard: what was written is found, and nothing else."""

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_subspace.tensorboard_tab.event_files import read_probes
from lightning_subspace.tensorboard_tab.schema import from_json, to_json
from lightning_subspace.tensorboard_tab.summary import summary_of
from tests.tensorboard_tab.runs import probes, write

STEPS = range(0, 1100, 100)


def as_read(steps, scale=1.0, **options):
    return [from_json(to_json(probe)) for probe in probes(steps, scale, **options)]


def events(folder):
    [file] = folder.rglob("*tfevents*")
    return file


def test_all_probes_of_all_runs_and_monitors(tmp_path):
    write(tmp_path / "a", STEPS).close()
    writer = write(tmp_path / "deep" / "b", STEPS, 3.0)
    write(None, STEPS, 5.0, writer=writer, name="other").close()
    assert read_probes(tmp_path) == {
        "a": {"subspace/probes": as_read(STEPS)},
        "deep/b": {"subspace/probes": as_read(STEPS, 3.0), "other/probes": as_read(STEPS, 5.0)},
    }


def test_the_folder_itself_is_a_run_that_tensorboard_calls_by_a_dot(tmp_path):
    write(tmp_path, STEPS).close()
    assert list(read_probes(tmp_path)) == ["."]
    assert read_probes(tmp_path / "absent") == {}


def test_two_files_of_one_run_are_read_in_the_order_they_were_opened(tmp_path):
    first = write(tmp_path, STEPS)
    first.close()
    events(tmp_path).rename(tmp_path / "events.out.tfevents.1000000000.host.1.0")
    write(tmp_path, range(500, 1600, 100)).close()
    steps = [probe["step"] for probe in read_probes(tmp_path)["."]["subspace/probes"]]
    assert steps == [*STEPS, *range(500, 1600, 100)]


def test_other_tags_are_ignored_also_where_they_speak_of_the_plugin(tmp_path):
    writer = EventFileWriter(str(tmp_path))
    scalar = Summary(value=[Summary.Value(tag="lightning_subspace/loss", simple_value=2.0)])
    writer.add_event(Event(wall_time=1.0, step=0, summary=scalar))
    foreign = summary_of('{"v":1,"step":7}', "subspace/probes/not")
    foreign.value[0].metadata.plugin_data.plugin_name = "text"
    writer.add_event(Event(wall_time=2.0, step=7, summary=foreign))
    write(None, STEPS, writer=writer).close()
    assert read_probes(tmp_path) == {".": {"subspace/probes": as_read(STEPS)}}


def test_a_writer_may_give_the_metadata_with_the_first_value_alone(tmp_path):
    writer = EventFileWriter(str(tmp_path))
    for number, probe in enumerate(probes(STEPS)):
        summary = summary_of(to_json(probe), "subspace/probes")
        if number:
            summary.value[0].ClearField("metadata")
        writer.add_event(Event(wall_time=1.0 + number, step=probe["step"], summary=summary))
    writer.close()
    assert read_probes(tmp_path) == {".": {"subspace/probes": as_read(STEPS)}}


def test_of_a_file_that_is_cut_off_anywhere_the_whole_records_are_read(tmp_path):
    write(tmp_path, STEPS).close()
    file = events(tmp_path)
    whole, expected = file.read_bytes(), as_read(STEPS)
    for length in range(0, len(whole), 97):  # in heads, texts and checksums
        file.write_bytes(whole[:length])
        found = read_probes(tmp_path).get(".", {}).get("subspace/probes", [])
        assert found == expected[: len(found)]
        assert len(found) >= (len(expected) - 1) * length // len(whole) - 2


def test_a_length_that_is_no_length_ends_the_file(tmp_path):
    (tmp_path / "events.out.tfevents.1").write_bytes(b"\xff" * 64)  # 2^64 - 1 bytes would follow
    assert read_probes(tmp_path) == {}


@pytest.mark.parametrize("record", [b"lightning_subspace" * 3, b"\x00lightning_subspace"])
def test_a_record_that_is_no_event_is_named_with_its_file(tmp_path, record):
    file = tmp_path / "events.out.tfevents.1"
    file.write_bytes(len(record).to_bytes(8, "little") + bytes(4) + record + bytes(4))
    with pytest.raises(ValueError, match=r"path: expected an event file, got '.*events.out.tfevents.1'"):
        read_probes(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"v":1,"step":NaN}'])
def test_a_text_that_is_no_json_is_named_with_its_file(tmp_path, text):
    writer = EventFileWriter(str(tmp_path))
    writer.add_event(Event(wall_time=1.0, step=0, summary=summary_of(text, "subspace/probes")))
    writer.close()
    with pytest.raises(ValueError, match=r"path: expected an event file, got .*subspace/probes"):
        read_probes(tmp_path)
