"""Writes small fastText classifiers, as there is no package that trains them: format version 12, softmax, no subwords."""

import struct
from pathlib import Path

import numpy as np


def write_classifier(path: Path, labels: dict[str, str], weight: float = 20.0) -> str:
    """A model that gives each label for the words (parted by spaces) that it is told for it; returns its path.

    As in all trained models the end of a line is a word, so that there is an answer to any text.
    """
    words = [(word, i) for i, members in enumerate(labels.values()) for word in members.split()]
    entries = [("</s>", 0)] + [(word, 0) for word, _ in words] + [(label, 1) for label in labels]
    dim, loss_softmax, supervised = len(labels), 3, 3
    content = struct.pack("<2i", 793712314, 12)
    content += struct.pack("<12id", dim, 5, 5, 1, 5, 1, loss_softmax, supervised, 0, 0, 0, 100, 1e-4)
    content += struct.pack("<3i2q", len(entries), len(words) + 1, len(labels), len(words), -1)
    for entry, kind in entries:
        content += entry.encode() + b"\0" + struct.pack("<qb", 1, kind)
    rows = np.zeros((len(words) + 1, dim), np.float32)
    rows[range(1, len(words) + 1), [i for _, i in words]] = 1
    for matrix in (rows, weight * np.eye(dim, dtype=np.float32)):
        content += struct.pack("<b2q", 0, *matrix.shape) + matrix.tobytes()
    path.write_bytes(content)
    return str(path)
