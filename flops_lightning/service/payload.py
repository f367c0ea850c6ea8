"""What goes over the wire: arrays as base64 of raw little-endian float32, images and classes by their content."""

import base64
import binascii
import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORDS = 4
"""A name is the SHA-256 of a content: 64 hexadecimal digits, or this many int64 in a tensor."""
FLOAT = np.dtype("<f4")

BASE64 = 4 / 3
"""Bytes of a byte in base64."""


def packed(x: Tensor) -> dict[str, Any]:
    """``shape`` and ``data`` (base64) of a tensor, in float32.

    Example:
        >>> packed(torch.tensor([1.0, 2.0]))
        {'shape': [2], 'data': 'AACAPwAAAEA='}
        >>> unpacked(packed(torch.tensor([1.0, 2.0])))
        tensor([1., 2.])
    """
    array = np.ascontiguousarray(x.detach().to("cpu", torch.float32).numpy(), dtype=FLOAT)
    return {"shape": list(x.shape), "data": base64.b64encode(array.tobytes()).decode("ascii")}


def unpacked(given: Any) -> Tensor:
    """The float32 tensor that :func:`packed` made.

    Raises:
        ValueError: it is something else.
    """
    try:
        shape = [int(n) for n in given["shape"]]
        raw = base64.b64decode(given["data"], validate=True)
    except (TypeError, KeyError, ValueError, binascii.Error) as error:
        raise ValueError("no array of `shape` and base64 `data`") from error
    if min(shape, default=0) < 0 or len(raw) != FLOAT.itemsize * math.prod(shape):
        raise ValueError(f"{len(raw)} bytes do not fill the shape {shape} with float32")
    return torch.from_numpy(np.frombuffer(raw, FLOAT).astype(np.float32).reshape(shape))


def classes_name(names: Sequence[str], template: str) -> str:
    """Name of class names and template, by their content."""
    return hashlib.sha256(json.dumps([list(names), template]).encode()).hexdigest()


def image_name(image: Tensor) -> bytes:
    """Name of an image in float32 on the CPU, by its content: 32 bytes."""
    array = np.ascontiguousarray(image.numpy(), dtype=FLOAT)
    return hashlib.sha256(json.dumps(array.shape).encode() + array.tobytes()).digest()


def hex_names(names: Tensor) -> list[str]:
    """Names of a ``(r, 4)`` tensor as text."""
    return [row.tobytes().hex() for row in np.ascontiguousarray(names.cpu().numpy(), dtype="<i8")]


class ImageStore:
    """Images by their content; those that were not used for longest go when there are too many bytes of them.

    Example:
        >>> store = ImageStore(most_bytes=2**20)
        >>> names = store.keep(torch.zeros(2, 3, 8, 8))
        >>> names.shape, torch.equal(names[0], names[1]), len(store)  # equal images have one name
        (torch.Size([2, 4]), True, 1)
    """

    def __init__(self, most_bytes: int) -> None:
        """Keep at most so many bytes, and always those of the last :meth:`keep`."""
        self.most_bytes = most_bytes
        self._images: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._images)

    def keep(self, images: Tensor) -> Tensor:
        """``(b, 4)`` names of ``(b, 3, h, w)`` images."""
        here = images.detach().to("cpu", torch.float32)
        digests = [image_name(image) for image in here]
        for digest, image in zip(digests, here, strict=True):
            self.put(digest.hex(), image)
        self._forget(len(set(digests)))
        return self.names([digest.hex() for digest in digests]).to(images.device)

    @staticmethod
    def names(texts: Sequence[str]) -> Tensor:
        """``(r, 4)`` names of these texts."""
        words = np.frombuffer(bytes.fromhex("".join(texts)), "<i8").reshape(-1, WORDS).astype(np.int64)
        return torch.from_numpy(words)

    def put(self, name: str, image: Tensor) -> None:
        """Keep an image whose name is known."""
        if name not in self._images:
            # A copy where the rest of a batch would stay with it.
            self._images[name] = image.clone()
            self._bytes += image.nbytes
        self._images.move_to_end(name)

    def _forget(self, but: int) -> None:
        while self._bytes > self.most_bytes and len(self._images) > but:
            self._bytes -= self._images.popitem(last=False)[1].nbytes

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of the names that are not here, each once."""
        return [name for name in dict.fromkeys(names) if name not in self._images]

    def get(self, names: Sequence[str]) -> Tensor:
        """``(r, 3, h, w)`` images of these names, which are here (KeyError)."""
        for name in names:
            self._images.move_to_end(name)
        return torch.stack([self._images[name] for name in names])


def changed(*rows: Tensor) -> Tensor:
    """``(r,)`` whether a row differs from the one before it, in any of ``(r, ...)`` tensors; True for the first.

    The last chunk of a plan is filled up with copies of its last row, and a service is paid by the row.
    """
    first = torch.ones(1, dtype=torch.bool)
    differs = [(x[1:] != x[:-1]).unsqueeze(-1).flatten(1).any(1) for x in rows]
    return torch.cat([first, torch.stack(differs).any(0).cpu()]) if len(rows[0]) else first[:0]


def checked_rows(answer: Mapping[str, Any], rows: Sequence[int], shape: Sequence[int]) -> Tensor:
    """``(r, *shape)`` values of an answer to these rows.

    Raises:
        ValueError: they are of other rows, in another order, or of another shape.
    """
    told = answer.get("rows")
    if told != list(rows):
        raise ValueError(f"its rows are {_short(told)} and those asked for {_short(list(rows))}")
    values = unpacked(answer.get("values"))
    if list(values.shape) != [len(rows), *shape]:
        raise ValueError(f"its values have the shape {tuple(values.shape)} and not {(len(rows), *shape)}")
    return values


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."
