"""Arrow columns from numpy and back without pandas, which pyarrow's own ways import: 0.3 s in every process."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def strings(texts: Sequence[str]) -> Any:
    """A column of texts."""
    content, lengths = "".join(texts).encode(), [*map(len, texts)]
    if len(content) > sum(lengths):  # else each character is one byte
        lengths = [len(text.encode()) for text in texts]
    return _strings(content, lengths)


def utf8(contents: Sequence[bytes]) -> Any:
    """A column of texts that are UTF-8 already."""
    return _strings(b"".join(contents), [*map(len, contents)])


def _strings(content: bytes, lengths: list[int]) -> Any:
    buffers = [None, pa.py_buffer(np.cumsum([0, *lengths])), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_string(), len(lengths), buffers)


def numbers(values: NDArray[Any]) -> Any:
    """A column of numbers, or of truth values."""
    if values.dtype == bool:
        bits = np.packbits(values, bitorder="little")
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])
    kept = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(kept.dtype), len(kept), [None, pa.py_buffer(kept)])


def to_numpy(column: Any) -> NDArray[Any]:
    """The numbers of a column of a table."""
    return np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks])
