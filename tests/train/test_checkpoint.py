"""Checkpoints: kills and damage at every place, files as safetensors reads them, states that come back."""

import hashlib
import io
import json
import os
import shutil
import signal
import sys
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from configs.errors import UserError
from data.order import Phase
from model.weights import FragmentReader, list_checkpoints, manifest_sha256, read_manifest
from tests.train.states import IDENTITY, NUMEL, Weights, write
from train import checkpoint, retention
from train.checkpoint import (
    Snapshot,
    Staging,
    commit,
    newest_usable,
    remove_unfinished,
    require_identity,
    restore,
    write_part,
    writing_folder,
)
from train.dist import Rank
from train.progress import Progress
from train.retention import remove_old

CPU = torch.device("cpu")


@pytest.fixture
def unsynced(monkeypatch):
    """Without waiting for the disk: a process that is killed, unlike a machine, leaves all it has written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class ShortWrites(io.FileIO):
    """A file that takes 100 bytes at a time, as any file may."""

    def write(self, data):
        return super().write(data[:100])


def is_killed(before_line, module, action):
    """Calls `action` in a process that kills itself before the n-th line of `module` that it would run.

    Returns whether it was killed; where it has fewer lines to run, it comes to its end.
    """
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), "the process failed by itself"
        return status == signal.SIGKILL
    visits = Counter()

    def trace(frame, event, _):
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            visits[frame.f_lineno] += 1
            # Of a loop, two rounds are enough.
            if sum(min(n, 2) for n in visits.values()) == before_line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    status = 1
    try:
        checkpoint.open = lambda path, mode, **how: (ShortWrites if mode == "wb" else open)(path, mode)
        sys.settrace(trace)
        action()
        status = 0
    finally:
        os._exit(status)


def every_kill(module, prepared, folder, action):
    """Folders in which `action` was killed, one for each line that it runs, and what stood there then."""
    for before_line in range(1, 10_000):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(prepared, folder)
        if not is_killed(before_line, module, action):
            return
        yield sorted(str(path.relative_to(folder / "checkpoints")) for path in folder.rglob("*") if path.is_file())


def files_of(path):
    return read_manifest(path)["files"]


def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def phase_of(there, folder):
    """How far the writing of step 8 over a damaged one has come."""
    new = [name.rpartition("/")[2] for name in there if name.startswith(".writing")]
    if not new:
        has_begun = (folder / "checkpoints/.writing-step-000000008").is_dir()
        old_is_there = "step-000000008/old" in there
        return "before data" if has_begun else "not begun" if old_is_there else "renamed"
    if not any(name.startswith("step-000000008") for name in there):
        return "between the old folder and the new"
    if "manifest.sha256" in new:
        return "before the rename"
    if "manifest.json" in new:
        return "before the manifest's hash"
    size = (folder / "checkpoints/.writing-step-000000008/rank-00000.safetensors").stat().st_size
    n_entries = sum(name.endswith(".json") for name in new)
    return "before the manifest" if n_entries == 2 else "in mid-data" if size and not n_entries else "in data"


def test_a_kill_at_any_line_of_a_write_leaves_a_whole_checkpoint(tmp_path, alone, unsynced):
    prepared, run = tmp_path / "prepared", tmp_path / "run"
    expected = {path.name: files_of(path) for path in (write(tmp_path / "expected", step) for step in (4, 8))}
    write(prepared, 4)
    not_whole = write(prepared, 8)
    damage(not_whole / "rank-00001.safetensors")
    (not_whole / "old").touch()
    phases = []
    for there in every_kill(checkpoint, prepared, run, lambda: write(run, 8)):
        phases.append(phase_of(there, run))
        remove_unfinished(run)
        names = {path.name for path in (run / "checkpoints").iterdir()}
        assert names <= set(expected)
        found, _ = newest_usable(run, alone)
        assert found.name == ("step-000000008" if phases[-1] == "renamed" else "step-000000004"), there
        assert files_of(found) == expected[found.name]
        again = write(run, 8)
        assert newest_usable(run, alone) == (again, [])
        assert files_of(again) == expected[again.name]
    assert list(dict.fromkeys(phases)) == [
        "not begun",
        "before data",
        "in data",
        "in mid-data",
        "before the manifest",
        "before the manifest's hash",
        "before the rename",
        "between the old folder and the new",
        "renamed",
    ]


def test_a_kill_while_old_ones_are_removed_leaves_the_others_whole(tmp_path, alone, unsynced):
    prepared, run = tmp_path / "prepared", tmp_path / "run"
    for step in (0, 4, 8, 12, 16):
        write(prepared, step)
    left = []
    for _ in every_kill(retention, prepared, run, lambda: remove_old(run, 16, 2, 0)):
        remove_unfinished(run)
        steps = {int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir()}
        assert {0, 12, 16} <= steps <= {0, 4, 8, 12, 16}
        left.append(len(steps))
        assert newest_usable(run, alone) == (run / "checkpoints/step-000000016", [])
    assert list(dict.fromkeys(left)) == [5, 4, 3]


def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(tmp_path, alone):
    older, newest = write(tmp_path, 4), write(tmp_path, 8)
    names = ["manifest.json", "manifest.sha256", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert sorted(path.name for path in newest.iterdir()) == names
    for path in map(newest.joinpath, names):
        content = path.read_bytes()
        for position in {*range(0, len(content), 1 if len(content) < 100 else 11), len(content) - 1}:
            flipped = bytes([content[position] ^ 1 << position % 8])
            for damaged in (content[:position], content[:position] + flipped + content[position + 1 :]):
                path.write_bytes(damaged)
                found, complaints = newest_usable(tmp_path, alone)
                assert found == older, (path.name, position)
                assert len(complaints) == 1 and path.name in complaints[0]
        path.write_bytes(content + b"\n")
        assert newest_usable(tmp_path, alone)[0] == older, path.name
        path.unlink()
        found, complaints = newest_usable(tmp_path, alone)
        assert found == older and path.name in complaints[0]
        # Reading it fails with EIO, as on a disk that is breaking.
        path.symlink_to("/proc/self/mem")
        found, complaints = newest_usable(tmp_path, alone)
        assert found == older and path.name in complaints[0] and "Input/output error" in complaints[0]
        path.unlink()
        path.write_bytes(content)
        assert newest_usable(tmp_path, alone) == (newest, [])


def test_where_none_is_whole_all_complaints_are_told(tmp_path, alone):
    assert newest_usable(tmp_path, alone) == (None, [])
    for step in (0, 4):
        damage(write(tmp_path, step) / "rank-00000.safetensors")
    (tmp_path / "checkpoints/step-000000008").mkdir()
    found, complaints = newest_usable(tmp_path, alone)
    assert found is None
    assert [f"step-{step:09d}" in text for step, text in zip((8, 4, 0), complaints, strict=True)] == [True] * 3
    assert all("remove this checkpoint's folder" in text for text in complaints)


def test_folders_under_other_names_do_not_count(tmp_path, alone):
    whole = write(tmp_path, 4)
    for name in ("step-000000004.copy", ".writing-step-000000008", ".removing-step-000000000", "step-x", "old"):
        shutil.copytree(whole, whole.with_name(name))
    whole.with_name("step-000000012").touch()
    assert newest_usable(tmp_path, alone) == (whole, [])
    remove_old(tmp_path, 4, 1, 0)
    assert list_checkpoints(tmp_path) == [whole]


TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__"),
    st.one_of(
        st.lists(st.floats(width=32), max_size=20).map(lambda x: torch.tensor(x, dtype=torch.float32)),
        st.binary(max_size=41).map(lambda x: torch.tensor(list(x), dtype=torch.uint8)),
    ),
    max_size=6,
)


@given(tensors=TENSORS)
@example(tensors={"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(0), "c": torch.ones(5)})
def test_files_are_what_safetensors_reads(tmp_path_factory, tensors):
    folder = tmp_path_factory.mktemp("part")
    write_part(folder, 7, Snapshot(tensors, [("weight", 0, 3)]))
    path = folder / "rank-00007.safetensors"
    found = load_file(path)
    assert {key: (t.dtype, t.numpy().tobytes()) for key, t in found.items()} == {
        key: (t.dtype, t.numpy().tobytes()) for key, t in tensors.items()
    }
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0, "tensors begin at a multiple of 8 bytes"
    entry = json.loads((folder / "rank-00007.json").read_text())
    assert entry == {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "fragments": [["weight", 0, 3]],
    }


def test_a_large_file_is_right(tmp_path):
    tensors = {"a": torch.randn(3_000_001), "b": torch.randint(256, (5056,), dtype=torch.uint8)}
    write_part(tmp_path, 0, Snapshot(tensors, []))
    found = load_file(tmp_path / "rank-00000.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_a_write_over_what_a_killed_one_has_left_is_whole(tmp_path, alone):
    """Files of a job with more ranks, and a longer one of this rank's."""
    folder = writing_folder(tmp_path, 4)
    for rank in range(3):
        write_part(folder, rank, Snapshot({"x": torch.zeros(5000)}, []))
    assert newest_usable(tmp_path, alone) == (None, [])
    remove_unfinished(tmp_path)
    found = write(tmp_path, 4)
    assert newest_usable(tmp_path, alone) == (found, [])
    assert sorted(files_of(found)) == ["rank-00000.safetensors", "rank-00001.safetensors"]


def test_weights_and_random_states_come_back_on_any_number_of_ranks(tmp_path):
    drawn = []
    for rank in range(2):
        torch.manual_seed(100 + rank)
        torch.rand(3)
        snapshot = Staging(CPU).copy(Weights(5, rank, 2))
        drawn.append(torch.rand(4))
        write_part(writing_folder(tmp_path, 7), rank, snapshot)
    path = commit(tmp_path, Progress(step=7, updates=6).to_json(), IDENTITY, 2)
    for world_size in (1, 2, 4):
        found = []
        for rank in range(world_size):
            weights, expected = Weights(0, rank, world_size), Weights(5, rank, world_size)
            progress = restore(path, weights, Rank(rank, world_size, CPU), seed=1)
            found.append(torch.rand(4))
            assert (progress.step, progress.updates) == (7, 6)
            assert all(torch.equal(weights.tensors[kind], t) for kind, t in expected.tensors.items())
        assert all(torch.equal(*pair) for pair in zip(found, drawn, strict=False))
        assert len({tuple(numbers.tolist()) for numbers in found}) == world_size, "every rank has its own"


def test_a_rank_that_was_not_there_has_other_numbers_at_every_step(tmp_path):
    paths = [write(tmp_path, step) for step in (4, 8)]
    found = set()
    for path in (*paths, *paths):
        for rank in range(2, 5):
            restore(path, Weights(0), Rank(rank, 5, CPU), seed=1)
            found.add(tuple(torch.rand(4).tolist()))
    assert len(found) == 6


def test_elements_that_no_file_holds_are_missed(tmp_path):
    reader = FragmentReader(write(tmp_path, 4))
    for name, start, numel in (("weight", 1, NUMEL), ("other", 0, 1)):
        with pytest.raises(UserError, match="elements asked for"):
            reader.read("master", name, start, numel)


NUMBERS = st.integers(0, 2**63 - 1)
FLOATS = st.floats(allow_nan=False)
BY_NAME = st.dictionaries(st.text("abc", min_size=1), NUMBERS)


@given(
    st.builds(
        Progress,
        **dict.fromkeys(("step", "updates", "tokens", "rewinds", "ledger_bytes"), NUMBERS),
        **dict.fromkeys(("lr", "flops", "device_s"), FLOATS),
        order_state=st.lists(st.integers(-(2**63), 2**63 - 1)),
        order_hash=st.text(),
        **dict.fromkeys(("consumed", "consumed_by_source", "consumed_by_part"), BY_NAME),
        phases=st.lists(st.builds(Phase, NUMBERS, BY_NAME)),
        skipped=st.lists(st.tuples(NUMBERS, NUMBERS)),
        losses=st.lists(FLOATS),
        skipped_steps=st.lists(NUMBERS),
    )
)
def test_progress_goes_through_json_unchanged(progress):
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress


def test_another_identity_or_format_is_refused(tmp_path):
    path = write(tmp_path, 4)
    require_identity(path, IDENTITY)
    for key, other in (("corpus_hash", "d"), ("seq_len", 64), ("seed", 2), ("vocab_rows", 512)):
        with pytest.raises(UserError) as refusal:
            require_identity(path, {**IDENTITY, key: other})
        assert refusal.value.found == f"{key} is {other}, the checkpoint {path.name} was trained with {IDENTITY[key]}"
        assert "seed" in refusal.value.rule and "name=" in refusal.value.repair
    manifest = json.dumps({**read_manifest(path), "format": 1})
    (path / "manifest.json").write_text(manifest)
    (path / "manifest.sha256").write_bytes(manifest_sha256(manifest.encode()))
    with pytest.raises(UserError) as refusal:
        require_identity(path, IDENTITY)
    assert refusal.value.found == f"{path.name} has format 1"
    assert refusal.value.rule == "this version of Marathon reads format 3" and refusal.value.repair
