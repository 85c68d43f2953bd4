"""Summaries for event files, with a probe each.

They need TensorBoard, and neither torch nor TensorFlow.
"""

from __future__ import annotations

from typing import Any

from lightning_subspace.tensorboard_tab.schema import PLUGIN, SCHEMA


def summary_of(text: str, tag: str) -> Any:
    """The protobuf with the string tensor of a probe.

    Args:
        text: of `schema.to_json`.
        tag: of `schema.tag_of`.

    Example:
        >>> summary_of('{"v":1,"step":3}', "subspace/probes").value[0].tensor.string_val[0]
        b'{"v":1,"step":3}'
    """
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2  # type: ignore

    plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name=PLUGIN, content=b'{"v":%d}' % SCHEMA)
    metadata = summary_pb2.SummaryMetadata(plugin_data=plugin, data_class=summary_pb2.DATA_CLASS_TENSOR)
    shape = tensor_shape_pb2.TensorShapeProto()
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=shape, string_val=[text.encode()])
    return summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])
