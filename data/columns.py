"""Arrow columns from numpy and back without pandas, which pyarrow's own ways import: 0.3 s in every process."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def strings(texts: Sequence[str]) -> Any:
    """A column of texts."""
    return utf8([text.encode() for text in texts])


def utf8(contents: Sequence[bytes]) -> Any:
    """A column of texts that are UTF-8 already."""
    ends = np.cumsum([0, *map(len, contents)])
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(contents))]
    return pa.Array.from_buffers(pa.large_string(), len(contents), buffers)


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
