"""Which files a path means, what is in them, block by block or line by line, and their hashes.

Nothing is passed over in silence: a folder that cannot be read, a pattern that matches nothing, and a
compressed file that is cut off or damaged each stop the stage with a `UserError` that names the file.
"""

import errno
import fnmatch
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from configs.errors import UserError

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
"""Folder that holds `data/`: a checkout, or where Marathon is installed. `package:` stands for it."""

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")

MAX_RECORD_BYTES = 1 << 26
"""64 MiB, a hundred novels. A longer record is bad: mostly a whole JSON array taken for JSON lines."""

BLOCK_BYTES = 1 << 20
PIECE_BYTES = 1 << 12
"""Compressed bytes taken at a time. zstd makes at most 2^15 times as much of them, which is 128 MiB."""

_REPAIRS = {
    errno.ENOENT: "correct the path; docs/own-text.md tells how to bring or fetch text",
    errno.ENOTDIR: "correct the path: a part of it is a file, not a folder",
    errno.EACCES: "chmod a+rX, or run as a user who may read it",
    errno.ELOOP: "a symbolic link points to itself: remove it",
}

_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": partial(zlib.decompressobj, wbits=31),
    # Archives made with `zstd --long` need windows above the default limit of 128 MiB.
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}


class InputFile(NamedTuple):
    """A file to read, and its name within its source: the same on every machine."""

    path: Path
    name: str


def find_files(path: str, suffixes: tuple[str, ...]) -> list[InputFile]:
    """Visible files, sorted: `path` itself, those with `suffixes` below it, or a glob's. `UserError` if none is."""
    target = PACKAGE_ROOT / path.removeprefix("package:") if path.startswith("package:") else Path(path)
    with readable(path):
        if any(c in path for c in "*?["):
            first = next(i for i, part in enumerate(target.parts) if any(c in part for c in "*?["))
            root = Path(*target.parts[:first])
            found = [p for p in _below(root, target.parts[first:]) if p.is_file()]
        elif stat.S_ISDIR(os.stat(target).st_mode):
            root, found = target, [p for p in _below(target, ("**", "*")) if p.name.endswith(suffixes)]
        else:
            root, found = target.parent, [target]
    if not found:
        rule = f"a source has at least one file; in a folder its name ends in {' or '.join(suffixes)}"
        raise UserError(f"{path}: no file", rule, "correct the path, or the format of the source")
    return [InputFile(p, p.relative_to(root).as_posix()) for p in sorted(set(found))]


def find_list(path: str) -> Path:
    """The file of a list or model that decides about documents; raises `UserError` where it is not just one."""
    try:
        (file,) = find_files(path, ("",))
    except (UserError, ValueError) as error:
        found = error.found if isinstance(error, UserError) else f"{path}: several files"
        rule = "lists and models are files: a list of opt-outs has a domain, an address or an id in each line"
        raise UserError(found, rule, "name a file that can be read; docs/corpus.md tells what is in it") from None
    return file.path


def read_blocks(path: Path) -> Iterator[bytes]:
    """Content in blocks of up to 1 MiB, decompressed by suffix; raises `UserError` where it is damaged or cut off."""
    with readable(str(path)), path.open("rb", buffering=BLOCK_BYTES) as file:
        try:
            for block in _decompressed(file, path.suffix):
                # A bomb comes as a block of up to 128 MiB; to split it at line breaks would take many times that.
                for start in range(0, len(block), BLOCK_BYTES):
                    yield block[start : start + BLOCK_BYTES]
        except (zlib.error, zstandard.ZstdError, EOFError) as error:
            repair = f"fetch or write the file again; `{'zstd' if path.suffix == '.zst' else 'gzip'} -t` checks it"
            raise damaged(f"{path}: {error}, at or before byte {file.tell()}", repair) from None


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of `read_blocks`, without line break; of one that is too long the first `MAX_RECORD_BYTES` + 1 bytes."""
    pieces, n_bytes = [b""], 0
    for block in read_blocks(path):
        first, *others = block.split(b"\n")
        pieces.append(first[: max(MAX_RECORD_BYTES + 1 - n_bytes, 0)])
        n_bytes += len(first)
        if others:
            yield b"".join(pieces)
            yield from others[:-1]
            pieces, n_bytes = [others[-1]], len(others[-1])
    if n_bytes:
        yield b"".join(pieces)


def sha256(path: Path) -> str:
    """Hash of a file, as hexadecimal digits."""
    with readable(str(path)), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_cached(files: Iterable[InputFile], cache: Path) -> dict[str, str]:
    """Hashes by name; a file whose path, size and time of change stand in `cache` is not read again."""
    known: dict[str, list[Any]] = json.loads(cache.read_text()) if cache.exists() else {}
    before, hashes = len(known), {}
    for file in files:
        with readable(str(file.path)):
            info = os.stat(file.path)
        key = f"{file.path.resolve()}|{info.st_size}|{info.st_mtime_ns}"
        if key not in known:
            known[key] = [sha256(file.path)]
        hashes[file.name] = known[key][0]
    if len(known) > before:
        write_whole(cache, json.dumps(known, indent=1))
    return hashes


def write_whole(path: Path, text: str) -> None:
    """Writes beside and renames: the file is complete or absent, also when two processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns what the file system says against reading `path` into a `UserError`."""
    try:
        yield
    except OSError as error:
        rule = "files of a source exist and can be read by the user who runs this"
        repair = _REPAIRS.get(error.errno or 0, "see to the file system")
        raise UserError(f"{error.filename or path}: {error.strerror or error}", rule, repair) from None


def damaged(found: str, repair: str) -> UserError:
    """The error for a file of a source that cannot be read to its end."""
    return UserError(found, "a source is read whole or not at all", repair)


def _below(folder: Path, pattern: tuple[str, ...]) -> Iterator[Path]:
    """Visible files that a pattern leads to; Path.rglob would pass in silence over folders that may not be read."""
    if not pattern:
        return
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    part, rest = pattern[0], pattern[1:]
    if part == "**":  # no folder, or any one with this again below it
        yield from _below(folder, rest)
        rest = pattern
    for entry in visible:
        if fnmatch.fnmatchcase(entry.name, part):
            if entry.is_dir():
                yield from _below(Path(entry.path), rest)
            elif not rest:
                yield Path(entry.path)


def _decompressed(file: BinaryIO, suffix: str) -> Iterator[bytes]:
    """Blocks of content. A file may hold several frames; the last must be whole, which libraries do not check."""
    fresh = _DECOMPRESSORS.get(suffix)
    if fresh is None:
        yield from iter(partial(file.read, BLOCK_BYTES), b"")
        return
    stream, is_whole = fresh(), False
    while chunk := file.read(PIECE_BYTES):
        while chunk:
            yield stream.decompress(chunk)
            is_whole = stream.eof
            chunk = stream.unused_data if is_whole else b""
            stream = fresh() if is_whole else stream
    if not is_whole:
        raise EOFError("the compressed file is cut off")
