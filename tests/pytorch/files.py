"""safetensors files: eight bytes with the header's length, a JSON header, the numbers."""

import json
import struct

import numpy
import torch

DTYPES = {"F32": (torch.float32, numpy.dtype("<f4")), "BF16": (torch.bfloat16, numpy.dtype("<i2"))}


def to_bytes(tensor):
    """The dtype's name and the numbers, little-endian. numpy has no bf16: its bits travel as integers."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return "BF16", tensor.view(torch.int16).numpy().astype("<i2").tobytes()
    return "F32", tensor.float().numpy().astype("<f4").tobytes()


def write(path, tensors):
    header, numbers, offset = {}, [], 0
    for name, tensor in tensors.items():
        dtype, data = to_bytes(tensor)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + len(data)]}
        numbers.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(numbers)


def read(path):
    """The tensors by name, and the metadata."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        numbers = file.read()
    metadata, tensors = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            continue
        dtype, stored = DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        array = numpy.frombuffer(numbers[begin:end], stored).astype(stored.newbyteorder("=")).reshape(entry["shape"])
        tensors[name] = torch.from_numpy(array).view(dtype)
    return tensors, metadata
