"""Folders on this machine or behind a URL, in which a file stands under its name only whole and as it should be.

Credentials and keys come from where ssh and S3 keep them, and a URL is told without user and password.
"""

import errno
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import yaml

from configs.errors import UserError

CHUNK_BYTES = 16 << 20
ARRIVING = ".arriving-"  # before the name of what is not yet whole
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "ssh": "sshfs", "sftp": "sshfs"}
# They cannot rename; an object is there once all of it has arrived.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs"}


@dataclass(frozen=True)
class File:
    """What a file has to be."""

    n_bytes: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "File":
        """The file with this content."""
        return cls(len(content), hashlib.sha256(content).hexdigest())


class Place:
    """A folder, by path or URL. Names of files and folders are paths below it."""

    def __init__(self, given: str) -> None:
        is_url = "://" in given
        scheme = given.partition("://")[0] if is_url else "file"
        if scheme not in fsspec.available_protocols() or (not is_url and ":" in given.partition("/")[0]):
            found = f"{scheme}:// is not known" if is_url else given
            rule = "a place is a folder or a URL: s3://BUCKET/…, sftp://HOST/… or another URL that fsspec knows"
            raise UserError(found, rule, "sftp://HOST/FOLDER, s3://BUCKET/FOLDER, or ./FOLDER")
        package = PACKAGES.get(scheme)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed", f"it speaks {scheme}://", f"pip install {package}")
        self.is_local, self.renames = scheme in ("file", "local"), scheme not in OBJECT_STORES
        parts = urlsplit(given if is_url else "")
        self.host = platform.node() if self.is_local else parts.netloc.rpartition("@")[2]
        self._told = f"{scheme}://{self.host}{parts.path}".rstrip("/")
        # Of a connection that breaks it would say a hundred times what we say once.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        # sshfs would take any host for the right one; with this, ssh's known_hosts decide.
        options: dict[str, Any] = {"known_hosts": (), "connect_timeout": 60} if package == "sshfs" else {}
        with self._answers():
            self.fs, root = fsspec.core.url_to_fs(given, **options)
        self.root: str = root.rstrip("/")
        if self.is_local:
            self._told = f"{self.host}:{self.root}"

    def __str__(self) -> str:
        return self._told

    def path(self, name: str) -> str:
        """How the file system calls it."""
        return f"{self.root}/{name}"

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each file below a folder; none where there is no such folder."""
        with self._answers(folder):
            found = self.fs.find(self.path(folder), detail=True)
        return {path[len(self.root) + 1 :]: info["size"] for path, info in found.items() if info}

    def glob(self, pattern: str) -> list[str]:
        """Names that fit a pattern, sorted."""
        with self._answers():
            return sorted(path[len(self.root) + 1 :] for path in self.fs.glob(self.path(pattern)))

    def read(self, name: str) -> bytes | None:
        """Content of a file, None where it is not there."""
        with self._answers(name), suppress(FileNotFoundError):
            return self.fs.cat_file(self.path(name))
        return None

    def take(self, name: str, file: File, source: "Place", source_name: str) -> None:
        """Copies a file from another place, one of the two being on this machine."""
        path = source.path(source_name)
        with self._arriving(name, file) as to:
            if self.is_local:
                source.fs.get_file(path, to)
            elif not self.renames:
                self.fs.put_file(path, to)
            else:
                # put_file of SSH passes over holes, and so leaves out the one at the end of a sparse file.
                with open(path, "rb") as content, self.fs.open(to, "wb") as out:
                    shutil.copyfileobj(content, out, CHUNK_BYTES)

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        with self._arriving(name, File.of(content)) as to:
            self.fs.pipe_file(to, content)

    def remove(self, name: str) -> None:
        """Removes a file or folder if it is there."""
        with self._answers(name), suppress(FileNotFoundError):
            self.fs.rm(self.path(name), recursive=True)

    def rename(self, old: str, new: str) -> None:
        """Gives a folder the place of another."""
        self.remove(new)
        with self._answers(new):
            self.fs.mv(self.path(old), self.path(new))

    @contextmanager
    def _arriving(self, name: str, file: File) -> Iterator[str]:
        """Gives the path to write to; what stands there gets its name when it is what was sent, and goes otherwise."""
        folder, _, last = name.rpartition("/")
        beside = f"{folder}/{ARRIVING}{last}" if self.renames else name
        try:
            with self._answers(name):
                if self.renames:
                    self.fs.makedirs(self.path(folder), exist_ok=True)
                yield self.path(beside)
                if (found := self._look_at(beside)) != file:
                    arrived = f"{self}/{name} arrived with {found.n_bytes:,} bytes and sha256 {found.sha256[:16]}…"
                    told = f"{arrived}, it has to have {file.n_bytes:,} and {file.sha256[:16]}…"
                    repair = "the same command again; if it says so again, the file is damaged where it comes from"
                    raise UserError(told, "a file gets its name only when it is what was sent", repair)
                if self.renames:
                    self.fs.mv(self.path(beside), self.path(name))
        except UserError:
            with suppress(UserError):
                self.remove(beside)
            raise

    def _look_at(self, name: str) -> File:
        """Reads a file back; here it is forced to disk too, since a list must not outlive what it lists."""
        digest, n_bytes = hashlib.sha256(), 0
        with self.fs.open(self.path(name), "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                n_bytes += len(chunk)
            if self.is_local:
                os.fsync(file.fileno())
        return File(n_bytes, digest.hexdigest())

    @contextmanager
    def _answers(self, name: str = "") -> Iterator[None]:
        """Every backend has exceptions of its own; places.yaml says what they mean."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            said, names = " ".join(str(error).split()) or type(error).__name__, set[str]()
            cause: BaseException | None = error
            while cause is not None:
                names |= {kind.__name__ for kind in type(cause).__mro__}
                names.add(errno.errorcode.get(getattr(cause, "errno", None) or 0, ""))
                cause = cause.__cause__ or cause.__context__
            known = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
            meant = next(entry for entry in known if names.intersection(entry["of"]))
            raise UserError(f"{self}{'/' if name else ''}{name}: {said}", meant["rule"], meant["repair"]) from error
