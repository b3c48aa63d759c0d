import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from configs.enums import SourceFormat
from configs.errors import UserError
from configs.text import SourceConfig
from data.sources import Document, read_file, units

N_HOSTILE = 10_000


def read(cfg: SourceConfig) -> tuple[list[Document], list[Document]]:
    """Documents, and what is none."""
    found = [document for file in units(cfg) for document in read_file("small", cfg, file)]
    return [d for d in found if not d.problem], [d for d in found if d.problem]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    text = iter(["Alle Menschen sind frei und gleich an Würde und Rechten geboren."] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text, model_writer=model, model_type="bpe", vocab_size=300, byte_fallback=True, pad_id=3,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    found = sentencepiece.SentencePieceProcessor(model_file=str(path))
    found.path = str(path)
    return found


def write_megatron(
    stem: Path, documents: list[list[list[int]]], code: int, dtype: str, tail: bytes = b""
) -> SourceConfig:
    """Documents of sequences of tokens, written without the code under test."""
    sequences = [sequence for document in documents for sequence in document]
    stem.with_suffix(".bin").write_bytes(b"".join(np.array(s, dtype).tobytes() for s in sequences))
    lengths = [len(s) for s in sequences]
    offsets = [sum(lengths[:i]) * np.dtype(dtype).itemsize for i in range(len(lengths))]
    ends = [0, *np.cumsum([len(document) for document in documents])]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(ends))
    arrays = np.array(lengths, "<i4").tobytes() + np.array(offsets, "<i8").tobytes() + np.array(ends, "<i8").tobytes()
    stem.with_suffix(".idx").write_bytes(header + arrays + tail)
    return SourceConfig(
        format=SourceFormat.megatron, path=f"{stem}.bin", licence="CC0-1.0", origin="here", lang="de", tokenizer=""
    )


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_tokens_made_elsewhere_come_back_as_text(tmp_path: Path, pieces: Any, code: int, dtype: str) -> None:
    texts = ["Alle Menschen  sind frei.\n\t\U0001f642 Ωmega", "zwei", "drei und vier"]
    if code == 1:
        texts = ["\x01\x02", "zwei\n", "\t"]
    ids = [pieces.encode(text) for text in texts]
    ids = [[i for i in one if i < 250] if code == 1 else one for one in ids]
    expected = [pieces.decode(one) for one in ids]
    documents = [[[1, *ids[0], 2]], [[1, *ids[1][:2]], ids[1][2:], [2, 3, 3]], [], [ids[2]], [[1, 2]]]
    cfg = write_megatron(tmp_path / "a", documents, code, dtype, tail=b"\0" * 6)
    cfg.tokenizer = pieces.path
    found, aside = read(cfg)
    whole = [(f"a.bin:{row}", text) for row, text in zip((1, 2, 4), expected, strict=True) if text.strip()]
    assert [(d.location, d.text) for d in found] == whole
    assert code == 1 or expected == texts
    assert {("a.bin:3", "text_empty"), ("a.bin:5", "text_empty")} <= {(d.location, d.problem) for d in aside}


def test_hostile_tokens_cost_one_document_each(tmp_path: Path, pieces: Any) -> None:
    rng = random.Random(0)
    choices = [pieces.encode("gut"), [], [300], [-1], [2**40], [0], [1, 2], [2, 2], list(range(4, 260)), [3] * 50]
    documents = [[rng.choice(choices) for _ in range(rng.randint(0, 2))] for _ in range(N_HOSTILE)]
    cfg = write_megatron(tmp_path / "a", documents, 5, "<i8")
    cfg.tokenizer = pieces.path
    found, aside = read(cfg)
    assert len(found) + len(aside) == N_HOSTILE and any(d.text == "gut" for d in found)
    assert {d.problem for d in aside} == {"text_empty", "token_not_in_vocabulary", "token_unknown"}


def test_damaged_or_foreign_token_files_are_named(tmp_path: Path, pieces: Any) -> None:
    cfg = write_megatron(tmp_path / "a", [[[5, 6]], [[7]]], 4, "<i4")
    cfg.tokenizer = pieces.path
    index, content = (tmp_path / "a.idx").read_bytes(), (tmp_path / "a.bin").read_bytes()
    floats = index[:17] + b"\x07" + index[18:]
    backwards = index[:-8] + struct.pack("<q", -1)
    for name, broken in [
        ("a.idx", index[:-1]),
        ("a.idx", b"no"),
        ("a.idx", floats),
        ("a.idx", backwards),
        ("a.bin", content[:-1]),
        ("a.bin", b""),
    ]:
        (tmp_path / "a.idx").write_bytes(index)
        (tmp_path / "a.bin").write_bytes(content)
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.bin with its \.idx"):
            read(cfg)
    (tmp_path / "a.idx").unlink()
    with pytest.raises(UserError, match=r"a\.idx"):
        read(cfg)
    for path in ("", str(tmp_path / "a.bin"), str(tmp_path / "missing.model")):
        cfg.tokenizer = path
        with pytest.raises(UserError):
            read(cfg)
