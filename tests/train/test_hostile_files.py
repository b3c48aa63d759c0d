"""Files of a run are read as data: one that would act when unpickled does nothing."""

import hashlib
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError

from configs.errors import UserError
from data.shards import SUFFIXES, Shard, ShardWriter, document_ids, read_sidecar
from data.store import DROPPED, Store
from model.weights import FragmentReader, file_sha256, manifest_sha256, read_manifest
from tests.test_layout import ROOMS, ROOT
from tests.train.states import Weights, write
from train.checkpoint import newest_usable, restore

SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*"))
    if path.suffix in (".py", ".sh", ".yaml")
}

CAN_HOLD_CODE = re.compile(
    r"""(?<!allow_)pickle | joblib | \bdill\b | \bshelve\b | \bmarshal\b | torch\.(load|save)\b | weights_only
    | allow_pickle(?!=False) | \b(np|numpy)\.load\b(?!.*allow_pickle=False) | \byaml\.(?!safe_load\b)(\w+_)?load
    | UnsafeLoader | trust_remote_code=True | \bexec\(""",
    re.VERBOSE | re.IGNORECASE,
)

TASK_OF_AN_ARRAY = {"slurm/array.sh": "pickle"}
"""datatrove hands a task to a job of its array so, in a file of the user who submits it: the same who may run anything.
No input, corpus or checkpoint is read in this way."""

BETWEEN_OWN_PROCESSES = {
    ("data/engine.py", "multiprocessing"),
    ("data/loader.py", "DataLoader"),
    ("data/loader.py", "multiprocessing"),
    ("train/dist.py", "all_gather_object"),
    ("train/dist.py", "broadcast_object_list"),
    ("eval/run.py", "gather_object"),
    ("eval/validation.py", "all_gather_object"),
}
"""The one thing that is pickled: what ranks of one job, and workers of one process, tell each other through sockets.
Who could write there is inside the job already. No file is read in this way."""


class Act:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def as_pickle(act):
    return pickle.dumps(act)


def as_torch_archive(act):
    file = io.BytesIO()
    torch.save({"weight": act}, file)
    return file.getvalue()


@pytest.fixture(params=[as_pickle, as_torch_archive], ids=["pickle", "torch archive"])
def hostile(tmp_path, request):
    """Content of a file, and the path that would be there if it had been unpickled."""
    acted = tmp_path / "acted"
    content = request.param(Act(acted))
    torch.load(io.BytesIO(content), weights_only=False) if request.param is as_torch_archive else pickle.loads(content)
    assert acted.exists(), "it has to act for this to say anything"
    acted.unlink()
    return content, acted


def with_hash(checkpoint, **changes):
    """Writes the manifest anew, with a hash that is right."""
    manifest = json.dumps({**read_manifest(checkpoint), **changes})
    (checkpoint / "manifest.json").write_text(manifest)
    (checkpoint / "manifest.sha256").write_bytes(manifest_sha256(manifest.encode()))


def test_no_room_reads_or_writes_what_can_hold_code():
    assert len(SOURCES) > 60
    found = {path: match[0] for path, text in SOURCES.items() if (match := CAN_HOLD_CODE.search(text))}
    assert found == TASK_OF_AN_ARRAY


def test_every_place_where_processes_send_each_other_objects_is_known():
    sends = re.compile(
        r"\w*(?:gather|broadcast|scatter|send|recv)_object\w*|(?<!elastic\.)\bmultiprocessing\b|\bDataLoader\b|\bPool\b"
    )
    found = {(path, name) for path, text in SOURCES.items() if path.endswith(".py") for name in sends.findall(text)}
    assert found == BETWEEN_OWN_PROCESSES


def test_a_checkpoint_that_would_act_is_an_error_and_does_not(tmp_path, alone, hostile):
    content, acted = hostile
    checkpoint = write(tmp_path, 4)
    path = checkpoint / "rank-00000.safetensors"
    path.write_bytes(content)
    assert newest_usable(tmp_path, alone)[0] is None
    files = read_manifest(checkpoint)["files"]
    files[path.name] |= {"sha256": file_sha256(path), "bytes": len(content)}
    with_hash(checkpoint, files=files)
    assert newest_usable(tmp_path, alone) == (checkpoint, [])
    with pytest.raises(SafetensorError):
        restore(checkpoint, Weights(0), alone, seed=1)
    with pytest.raises(SafetensorError):
        FragmentReader(checkpoint).random_states(0)
    assert not acted.exists()


def test_a_manifest_that_would_act_is_an_error_and_does_not(tmp_path, alone, hostile):
    content, acted = hostile
    checkpoint = write(tmp_path, 4)
    (checkpoint / "manifest.json").write_bytes(content)
    assert newest_usable(tmp_path, alone)[0] is None
    (checkpoint / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")
    with pytest.raises(UserError):
        read_manifest(checkpoint)
    assert not acted.exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_shard_that_would_act_is_an_error_and_does_not(tmp_path, hostile, suffix):
    content, acted = hostile
    stem = tmp_path / "shard"
    writer = ShardWriter(stem, 1000, bos_id=1, eos_id=2)
    writer.add(pa.table({"id": ["document"], "n_bytes": [4]}), np.array([3]), np.array([5, 6, 7]))
    writer.close()
    assert document_ids(stem, [0]) == {0: "document"} and Shard(stem).n_docs == 1
    Path(f"{stem}{suffix}").write_bytes(content)
    if suffix == ".docs.parquet":
        with pytest.raises(UserError, match=r"shard\.docs\.parquet"):
            document_ids(stem, [0])
        with pytest.raises(ValueError):
            list(read_sidecar(stem, "id"))
    else:
        with pytest.raises(UserError, match=rf"shard\{suffix}"):
            Shard(stem)
    assert not acted.exists()


def test_rows_of_documents_that_would_act_are_an_error_and_do_not(tmp_path, hostile):
    content, acted = hostile
    store, file = Store(tmp_path, tmp_path, ["a/00000"], without_questions=False), "units/a/00000/de.train.parquet"
    path = (tmp_path / file).with_suffix(DROPPED)
    path.parent.mkdir(parents=True)
    for write_rows in (path.write_bytes, lambda _: np.save(path, np.array([Act(acted)], object))):
        write_rows(content)
        with pytest.raises(UserError, match=r"de\.train\.dropped\.npy"):
            store.rows(file, DROPPED)
    assert not acted.exists()
