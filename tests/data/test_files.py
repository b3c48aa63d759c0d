import gzip
import itertools
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from data.files import InputFile, find_files, read_lines, sha256, sha256_cached

LINES = [f"line {i} ".encode() * 50 for i in range(2000)]
PLAIN = b"\n".join(LINES)


def pack(suffix: str, content: bytes) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    return zstandard.ZstdCompressor(write_checksum=True).compress(content) if suffix == ".zst" else content


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("frames", [1, 3])
def test_lines_come_back_from_any_number_of_frames(tmp_path: Path, suffix: str, frames: int) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    cut = [len(PLAIN) * i // frames for i in range(frames + 1)]
    path.write_bytes(b"".join(pack(suffix, PLAIN[a:b]) for a, b in itertools.pairwise(cut)))
    assert list(read_lines(path)) == LINES


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("keep", [0, 0.3, 0.999])
def test_a_cut_off_file_is_named_with_its_place(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = pack(suffix, PLAIN)
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}.* byte {int(len(whole) * keep)}\n"):
        list(read_lines(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_second_frame_that_is_cut_off_is_found(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(suffix, PLAIN) + pack(suffix, PLAIN)[:-3])
    with pytest.raises(UserError, match="cut off"):
        list(read_lines(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_flipped_bit_is_found(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    damaged = bytearray(pack(suffix, PLAIN))
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="read whole or not at all"):
        list(read_lines(path))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_that_is_too_long_is_cut_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("data.files.MAX_RECORD_BYTES", 1 << 20)
    path = tmp_path / f"array.jsonl{suffix}"
    lines = [b"{}", b"[" + b"1," * (3 << 20), b"{1}", b"x" * (1 << 20), b"y" * ((1 << 20) + 1), b"last"]
    path.write_bytes(pack(suffix, b"\n".join(lines)))
    assert list(read_lines(path)) == [line[: (1 << 20) + 1] for line in lines]


@given(st.lists(st.binary(max_size=12), max_size=30), st.integers(1, 9), st.integers(1, 40))
def test_lines_do_not_depend_on_where_blocks_end(lines: list[bytes], block_bytes: int, limit: int) -> None:
    content = b"\n".join(lines)
    blocks = [content[i : i + block_bytes] for i in range(0, len(content), block_bytes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.files.read_blocks", lambda path: iter(blocks))
        patch.setattr("data.files.MAX_RECORD_BYTES", limit)
        found = list(read_lines(Path("any")))
    expected = content.split(b"\n")
    expected = expected[:-1] if not expected[-1] else expected
    assert [line[: limit + 1] for line in found] == [line[: limit + 1] for line in expected]
    assert all(len(line) <= max(limit + 1, block_bytes) for line in found)


BOMB = """
import sys
from pathlib import Path
from data.files import read_lines
n = sum(1 for _ in read_lines(Path(sys.argv[1])))
# Not ru_maxrss, which begins with what the process had that started this one.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(n, int(peak.split()[1]) // 1024)
"""


@pytest.mark.parametrize(("suffix", "gibibytes"), [(".zst", 1), (".gz", 0.25)])
def test_a_bomb_does_not_fill_the_memory(tmp_path: Path, suffix: str, gibibytes: float) -> None:
    path = tmp_path / f"bomb.jsonl{suffix}"
    packer = zlib.compressobj(9, wbits=31) if suffix == ".gz" else zstandard.ZstdCompressor().compressobj()
    spaces = b" " * (1 << 20)
    with path.open("wb") as file:
        file.write(packer.compress(b'{}\n{"text": "'))
        for _ in range(int(gibibytes * 1024)):
            file.write(packer.compress(spaces))
        file.write(packer.compress(b'"}\n{}\n') + packer.flush())
    assert path.stat().st_size < 1 << 19
    ran = subprocess.run([sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, check=True)
    n_lines, mebibytes = map(int, ran.stdout.split())
    assert n_lines == 3 and mebibytes < 600


def test_files_are_found_sorted_and_named_within_their_source(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl.gz", "a.jsonl.zst", "c.txt", ".hidden/3.jsonl", "b/.4.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(path: str) -> list[str]:
        return [f.name for f in find_files(path, (".jsonl", ".jsonl.gz", ".jsonl.zst"))]

    assert names(str(tmp_path)) == ["a.jsonl.zst", "b/1.jsonl.gz", "b/2.jsonl"]
    assert names(f"{tmp_path}/*/*.jsonl*") == ["b/1.jsonl.gz", "b/2.jsonl"]
    assert names(f"{tmp_path}/**/*.jsonl*") == ["a.jsonl.zst", "b/1.jsonl.gz", "b/2.jsonl"]
    assert names(f"{tmp_path}/b/2.jsonl") == ["2.jsonl"]
    assert names("package:data/samples/udhr-europe.jsonl.zst") == ["udhr-europe.jsonl.zst"]


@pytest.mark.parametrize("path", ["missing.jsonl", "missing/*.jsonl", "empty", "*.jsonl", "file/below.jsonl", "loop"])
def test_a_path_that_leads_to_no_file_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=str(tmp_path)):
        find_files(str(tmp_path / path), (".jsonl",))


AS_NOBODY = """
import os, sys
from configs.errors import UserError
from data.files import find_files, read_lines, sha256
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
path = sys.argv[1]
try:
    for file in find_files(path, (".jsonl",)):
        list(read_lines(file.path))
except UserError as error:
    sys.exit(7 if "Permission denied" in str(error) and "chmod" in str(error) else 8)
"""


@pytest.mark.parametrize("path", ["closed", ".", "*/1.jsonl", "**/*.jsonl", "open/2.jsonl"])
def test_what_may_not_be_read_is_never_passed_over(path: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for folder in ("open", "closed"):
            (root / folder).mkdir(mode=0o755)
            (root / folder / "1.jsonl").write_text("{}")
        (root / "open" / "2.jsonl").write_text("{}")
        (root / "open" / "2.jsonl").chmod(0)
        (root / "closed").chmod(0)
        ran = subprocess.run([sys.executable, "-c", AS_NOBODY, str(root / path)], capture_output=True)
        assert ran.returncode == 7, ran.stderr
        (root / "closed").chmod(0o755)


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.jsonl", tmp_path / "corpora" / "inputs.json"
    files = [InputFile(path, "a.jsonl")]
    path.write_text("one")
    first = sha256_cached(files, cache)
    assert first == {"a.jsonl": sha256(path)}
    info = path.stat()
    path.write_text("two")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert sha256_cached(files, cache) == first, "same size and time: not read again"
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    assert sha256_cached(files, cache) == {"a.jsonl": sha256(path)} != first
