"""Stand-ins for judges, and for NudeNet v2's classifier: an ONNX file as the real one is read."""

from contextlib import contextmanager

import numpy as np

from vldnp.models.judges import Judgement


class EverythingUnsafe:
    name, revision = "everything-is-unsafe", "1"

    def __call__(self, images):
        return Judgement(np.full(len(images), 0.9), [{"knife": 0.9}] * len(images))


def message(*fields) -> bytes:
    """Protocol buffers' wire format: (number, value) with whole numbers, texts or messages."""
    data = b""
    for number, value in fields:
        if isinstance(value, int):
            data += varint(number << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            data += varint(number << 3 | 2) + varint(len(value)) + value
    return data


def varint(value: int) -> bytes:
    data = b""
    while value > 127:
        data, value = data + bytes([value & 127 | 128]), value >> 7
    return data + bytes([value])


WEIGHTS = np.array([[4, -1], [-2, 3], [0.5, 1]], dtype=np.float32)


def classifier(path, weights=WEIGHTS):
    """An ONNX network: softmax(mean over the pixels of `[B, 256, 256, 3]` times `weights`)."""

    def tensor_type(name, *dimensions):
        shape = [(1, message((2, d) if isinstance(d, str) else (1, d))) for d in dimensions]
        kind = message((1, message((1, 1), (2, message(*shape)))))
        return message((1, name), (2, kind))

    def node(kind, sources, result, *attributes):
        return message(*((1, s) for s in sources), (2, result), (4, kind), *attributes)

    axes = message((1, "axes"), (8, 1), (8, 2), (20, 7))
    keep = message((1, "keepdims"), (3, 0), (20, 2))
    matrix = message((1, 3), (1, 2), (2, 1), (8, "w"), (9, weights.tobytes()))
    graph = message(
        (1, node("ReduceMean", ["x"], "mean", (5, axes), (5, keep))),
        (1, node("MatMul", ["mean", "w"], "logits")), (1, node("Softmax", ["logits"], "y")),
        (2, "classifier"), (5, matrix), (11, tensor_type("x", "B", 256, 256, 3)),
        (12, tensor_type("y", "B", 2)),
    )  # fmt: skip
    path.write_bytes(message((1, 8), (7, graph), (8, message((1, ""), (2, 13)))))
    return path


@contextmanager
def spoiled(module, call, row, bad):
    """In its call of that number (from 0), one element of one row of the module's output is bad."""
    calls = []

    def spoil(module, inputs, output):
        calls.append(output)
        if len(calls) == call + 1:
            output = output[0] if isinstance(output, tuple) else output
            output[(row, *[0] * (output.ndim - 1))] = bad

    hook = module.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()
