import hashlib
import shutil
from pathlib import Path

import pytest

from configs.errors import UserError
from data.manifest import Manifest, marks, verify, verify_files
from data.shards import SUFFIXES


@pytest.mark.parametrize(
    "victim", ["shards/mt.udhr.train.00000.bin", "shards/mt.udhr.valid.00000.idx", "tokenizer/tokenizer.json"]
)
def test_a_flipped_bit_is_named(corpus: Path, tmp_path: Path, victim: str) -> None:
    copied = shutil.copytree(corpus, tmp_path / "copy")
    path, known = copied / victim, marks(copied)
    content = bytearray(path.read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    changed = [name for name, mark in marks(copied).items() if mark != known[name]]
    assert changed == [victim]
    verify_files(copied, known.keys() - {victim})
    after = hashlib.sha256(content).hexdigest()
    with pytest.raises(UserError, match=f"{path}: its sha256 is {after}, the manifest says {before}"):
        verify_files(copied, changed)
    with pytest.raises(UserError, match=str(path)):
        verify(copied)


def test_marks_name_each_file_of_the_manifest_with_size_and_time(corpus: Path) -> None:
    files = {
        p.relative_to(corpus).as_posix(): p.stat() for d in ("shards", "tokenizer") for p in (corpus / d).iterdir()
    }
    for report in ("json", "txt"):  # says how well the tokenizer does, and decides nothing
        del files[f"tokenizer/report.{report}"]
    found = marks(corpus)
    assert found == {name: [info.st_size, info.st_mtime_ns] for name, info in files.items()}
    assert len(found) > 48 * 3


def test_files_that_vanished_are_named_together(corpus: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(corpus, tmp_path / "copy")
    n_files, gone = len(marks(corpus)), [f"shards/bg.udhr.train.00000{suffix}" for suffix in SUFFIXES]
    for name in gone[:2]:
        (copied / name).unlink()
    with pytest.raises(UserError, match=f"2 of {n_files} files in {copied}: {gone[0]}: No such file.*; {gone[1]}: "):
        marks(copied)
    with pytest.raises(UserError, match=gone[1]):
        verify_files(copied, gone[1:])
    shutil.rmtree(copied / "tokenizer")
    (copied / gone[2]).unlink()
    with pytest.raises(UserError, match=r"; and \d more") as error:
        verify(copied)
    assert "restore the file" in error.value.repair and "marathon data" in error.value.repair


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shards": []}', '{"shards": [{"stem": "a"}]}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "manifest.json")):
        Manifest.load(tmp_path)
