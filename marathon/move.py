"""Moves a run to another machine, or into a pack from which another machine takes it.

What arrives is laid out as a scratch folder is: `runs/NAME` with the newest whole checkpoint, and the `corpora/KEY` it
trains on. Each file is read back and compared with its hash before it gets its name. Config and ledger follow the
rest, so that nothing half moved looks like a run; last comes `runs/NAME/moved.json`, the list of all files.
"""

import json
import os
import shlex
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data.manifest import MANIFEST, Manifest, marks
from data.manifest import verify_files as verify_corpus
from ledger.pages import render
from ledger.progress import Progress
from ledger.record import Ledger
from marathon.choices import run_folder
from marathon.places import ARRIVING, File, Place
from marathon.stages import CHECKPOINTS, prepared_corpus
from model.weights import file_sha256, list_checkpoints, read_manifest, verify_files

Record = dict[str, Any]
LIST, PARTIAL_LIST = "moved.json", ".moving.json"  # of all files that arrived, and of those that have so far
LIST_EVERY_S = 5.0  # a killed move sends again what it finished since the last list, and the file it was in


@dataclass(frozen=True)
class Pack:
    """What a run consists of; files by path below a scratch folder, in the order of sending."""

    checkpoint: str  # runs/NAME/checkpoints/step-…
    corpus: str  # corpora/KEY
    corpus_hash: str
    files: dict[str, File]  # without those that grow while a run goes on, but where it comes from a pack

    @classmethod
    def of(cls, listed: bytes) -> "Pack":
        """The pack that has this list."""
        found = json.loads(listed)
        return cls(**{**found, "files": {name: File(**entry) for name, entry in found["files"].items()}})

    def write(self, target: Place, name: str, files: dict[str, File]) -> None:
        """Lists those files of it that have arrived."""
        target.write(name, json.dumps(asdict(replace(self, files=files)), indent=1).encode())

    def n_bytes(self, names: Iterable[str]) -> int:
        """Of these files."""
        return sum(self.files[name].n_bytes for name in names)


def move(given: str, to: str) -> None:
    """Brings a run and its corpus to the scratch folder or pack `to`, a folder or URL; goes on where it stopped.

    `given` is a run's folder, its name under the scratch folder, or the URL of a pack.
    """
    source, name = _find_run(given)
    target, run = Place(to), f"runs/{name}"
    if str(source) == str(target):
        raise UserError(f"--to {target}", "the run is there already", "--to another folder or URL")
    if not (source.is_local or target.is_local):
        raise UserError(f"from {source} to {target}", "one of both is on this machine", "move it here first")
    with tempfile.TemporaryDirectory() as folder:
        desk = Path(folder)
        history = _history(source, target, run, desk)
        pack = _look_through(source, run) if source.is_local else _read_list(source, run)
        pack, arrived = _look_over_there(target, run, pack, desk)
        sent = _send(source, target, run, pack, arrived)
        _hand_over(source, target, run, pack, desk)
    known = [record["arguments"] for record in history if "arguments" in record] or [["experiment=…", f"name={name}"]]
    # The cluster there is another.
    kept = shlex.join(argument for argument in known[-1] if not argument.startswith(("cluster=", "cluster.")))
    told = {"name": name, "target": target, "pack": pack, "sent": sent, "arguments": kept, "quote": shlex.quote}
    print(render(Path(__file__).with_name("move.txt.j2"), **told).rstrip())


def _find_run(given: str) -> tuple[Place, str]:
    if "://" not in given:
        given = os.path.abspath(run_folder(given))
    root, found, name = given.rstrip("/").rpartition("/runs/")
    place = Place(root if found else given)
    there = [path.split("/")[1] for path in place.glob("runs/*/config.yaml")]
    if not found and len(there) == 1:
        name = there[0]
    if name not in there:
        told = f"no run {name if found else 'named'} in {place}; there: {', '.join(there) or 'none'}"
        rule = "a run is given as its folder …/runs/NAME, its name under MARATHON_SCRATCH, or the URL of a pack"
        raise UserError(told, rule, "marathon move RUN --to FOLDER_OR_URL")
    return place, name


def _history(source: Place, target: Place, run: str, desk: Path) -> list[Record]:
    """The run's ledger; refuses where something has been done over there that it does not know of."""
    ledger, histories = Ledger(desk), []
    for place in (source, target):
        ledger.path.write_bytes(place.read(f"{run}/{ledger.path.name}") or b"")
        histories.append(list(ledger.read()))
    known, found = ([r for r in history if r["event"] != "arrived"] for history in histories)
    if found != known[: len(found)]:
        told = f"{target}/{run} has a history of its own: `{found[-1]['event']}` is the last of {len(found)} records"
        repair = "move it from there; or give that folder another name if what was done there may be left"
        raise UserError(told, "a run is moved to where it is not yet, or has not gone on", repair)
    return histories[0]


def _look_through(source: Place, run: str) -> Pack:
    """What a run on this machine consists of; its checkpoint is verified, its corpus is yet to be."""
    run_dir = Path(source.path(run))
    record, checkpoint = prepared_corpus(run_dir), _newest_whole(run_dir)
    corpus: Path = record["path"]
    marks(corpus)  # refuses where one is missing
    known = {corpus / name: sha256 for name, sha256 in Manifest.load(corpus).hashes.items()}
    paths = [*known, corpus / MANIFEST]
    known |= {checkpoint / name: entry["sha256"] for name, entry in read_manifest(checkpoint)["files"].items()}
    paths += sorted(checkpoint.iterdir(), key=lambda path: (path not in known, path.name))
    paths += sorted((run_dir / "eval").glob("*.json"))
    root = Path(source.root)
    files = {str(p.relative_to(root)): File(p.stat().st_size, known.get(p) or file_sha256(p)) for p in paths}
    return Pack(str(checkpoint.relative_to(root)), str(corpus.relative_to(root)), record["corpus_hash"], files)


def _newest_whole(run_dir: Path) -> Path:
    for checkpoint in reversed(list_checkpoints(run_dir)):
        try:
            verify_files(checkpoint)
            return checkpoint
        except UserError as error:
            print(f"not moved: {error}", flush=True)
    raise UserError(f"{run_dir} has no whole checkpoint", "a run goes on from one", "train it there from the beginning")


def _read_list(source: Place, run: str) -> Pack:
    """What a pack consists of, by its list and by what is there."""
    content = source.read(f"{run}/{LIST}")
    if content is None:
        repair = "give the command that made the pack once more: it goes on where it stopped"
        raise UserError(f"{source}/{run}/{LIST} is not there", "a pack is complete when its list is", repair)
    pack = Pack.of(content)
    sizes = source.sizes(run) | source.sizes(pack.corpus)
    for name, file in pack.files.items():
        if sizes.get(name) != file.n_bytes:
            found = f"{source}/{name} has {sizes.get(name, 'no')} bytes, the list says {file.n_bytes}"
            repair = "make it again; or, if the run went on there, give `marathon move` on that machine"
            raise UserError(found, "a pack is taken as it was made", repair)
    return pack


def _look_over_there(target: Place, run: str, pack: Pack, desk: Path) -> tuple[Pack, dict[str, File]]:
    """The pack with the corpus as it stands at the target, if it does, and all files that need not be sent."""
    sizes = target.sizes(run) | target.sizes(pack.corpus)
    corpus = f"{pack.corpus}/"
    arrived: dict[str, File] = {}
    for name in (LIST, PARTIAL_LIST):
        if content := target.read(f"{run}/{name}"):
            arrived |= Pack.of(content).files
    if (content := target.read(corpus + MANIFEST)) is not None:
        (desk / MANIFEST).write_bytes(content)
        manifest = Manifest.load(desk)
        if manifest.corpus_hash != pack.corpus_hash:
            hashes = f"hash {manifest.corpus_hash[:16]}…, the run's is {pack.corpus_hash[:16]}…"
            rule = "a run goes on with the tokens and the tokenizer it began with"
            repair = "give that folder another name, or move to another scratch folder"
            raise UserError(f"{target}/{pack.corpus} has {hashes}", rule, repair)
        # Prepared there or brought by another run, it is what its own manifest says; sidecars may differ from ours.
        theirs = {corpus + name: File(sizes.get(corpus + name, -1), h) for name, h in manifest.hashes.items()}
        ours = {name: file for name, file in pack.files.items() if theirs.get(name, file).sha256 == file.sha256}
        if all(file.n_bytes >= 0 and ours.get(name, file) == file for name, file in theirs.items()):
            theirs[corpus + MANIFEST] = File.of(content)
            rest = {name: file for name, file in pack.files.items() if not name.startswith(corpus)}
            pack, arrived = replace(pack, files=theirs | rest), arrived | theirs
    return pack, {path: file for path, file in arrived.items() if sizes.get(path) == file.n_bytes}


def _send(source: Place, target: Place, run: str, pack: Pack, arrived: dict[str, File]) -> list[str]:
    """Sends what has not arrived, but for `_texts`, and returns the names of that; `arrived` counts up."""
    checkpoints, step = f"{run}/{CHECKPOINTS}", f"{pack.checkpoint}/"
    # A folder named step-… counts as a checkpoint, so it gets that name when it is whole.
    is_hidden = target.renames and any(arrived.get(n) != f for n, f in pack.files.items() if n.startswith(step))
    hidden = f"{checkpoints}/{ARRIVING}{Path(step).name}/" if is_hidden else step
    paths = {name: name.replace(step, hidden) for name in pack.files if name not in _texts(run)}
    missing = [name for name, path in paths.items() if arrived.get(path) != pack.files[name]]
    if source.is_local:
        shards = [name.removeprefix(f"{pack.corpus}/") for name in missing if name.startswith(f"{pack.corpus}/")]
        verify_corpus(Path(source.path(pack.corpus)), [name for name in shards if name != MANIFEST])
    for folder in {path.rpartition("/")[0] for path in target.sizes(checkpoints)} - {hidden.rstrip("/")}:
        if Path(folder).name.startswith(ARRIVING):  # of an older checkpoint, by a move that was killed
            target.remove(folder)
    pack.write(target, f"{run}/{PARTIAL_LIST}", arrived)
    target.remove(f"{run}/{LIST}")
    next_list_s = time.monotonic() + LIST_EVERY_S
    with Progress("moving", "MB", pack.n_bytes(missing) // 10**6) as progress:
        for name in missing:
            target.take(paths[name], pack.files[name], source, name)
            arrived[paths[name]] = pack.files[name]
            progress.advance(pack.files[name].n_bytes // 10**6)
            if time.monotonic() >= next_list_s:
                pack.write(target, f"{run}/{PARTIAL_LIST}", arrived)
                next_list_s = time.monotonic() + LIST_EVERY_S
    if is_hidden:
        target.rename(hidden.rstrip("/"), pack.checkpoint)
    return missing


def _hand_over(source: Place, target: Place, run: str, pack: Pack, desk: Path) -> None:
    """Tells both ledgers of the hop, and sends what makes the folder over there a run."""
    ledger, files = Ledger(desk), dict(pack.files)
    if source.is_local:
        facts = {"to": str(target), "checkpoint": Path(pack.checkpoint).name, "files": len(files)}
        Ledger(Path(source.path(run))).append("moved", **facts, bytes=pack.n_bytes(files))
    for name in _texts(run):
        if (content := source.read(name)) is None:
            continue
        if files.get(name, file := File.of(content)) != file:
            raise UserError(f"{source}/{name} is not as listed", "a pack is taken as it was made", "make it again")
        if Path(name).name == ledger.path.name:
            ledger.path.write_bytes(content)
            ledger.append("arrived", **{"from": str(source)}, at=str(target), host=target.host)
            content = ledger.path.read_bytes()
        target.write(name, content)
        files[name] = File.of(content)
    pack.write(target, f"{run}/{LIST}", files)
    target.remove(f"{run}/{PARTIAL_LIST}")


def _texts(run: str) -> list[str]:
    """What grows while a run goes on: sent as it is at the end, the ledger last."""
    return [f"{run}/{name}" for name in ("metrics.jsonl", "config.yaml", "ledger.jsonl")]
