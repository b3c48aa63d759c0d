"""What a rank trains with, made in reading order: corpus, checkpoint to go on from, order of samples, engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import RunConfig
from data import manifest as corpus
from data.heldout import valid_documents
from data.loader import Samples
from data.manifest import TRAIN, Manifest
from data.mixture import plan_phases
from data.order import unskipped
from ledger.energy import Meter
from ledger.record import Ledger
from model.decoder import Decoder, flops_per_token, init_weights, padded_rows
from model.weights import checkpoint_sha256, read_manifest, verify_files
from train.begin import require_fit
from train.checkpoint import Saver, adopt, newest_usable, remove_unfinished, require_identity
from train.dist import Rank
from train.engine import Engine
from train.faults import JobClock, StopSignals, Watchdog
from train.metrics import Metrics, meter_name, peak_flops
from train.progress import Progress
from train.retention import require_space
from train.schedule import step_shape


class Job:
    """One start of a run, on one rank; its weights are not yet those of the checkpoint to go on from.

    Raises `UserError` on all ranks where corpus, checkpoints or disk are not what a run needs.
    """

    def __init__(
        self, cfg: RunConfig, run_dir: Path, corpus_dir: Path, rank: Rank, signals: StopSignals, watchdog: Watchdog
    ) -> None:
        self.cfg, self.run_dir, self.ledger, self.rank = cfg, run_dir, Ledger(run_dir), rank
        self.signals, self.watchdog, self.clock = signals, watchdog, JobClock()
        on_node = [
            fact for fact in rank.gather((rank.host, rank.rank, meter_name(rank.device))) if fact[0] == rank.host
        ]
        # One process a node reads for all.
        self.meter = Meter([device for _, _, device in on_node] if rank.rank == on_node[0][1] else [])
        manifest = Manifest.load(corpus_dir)
        self._verify_corpus(corpus_dir)
        self.vocab_rows = padded_rows(manifest.tokenizer.vocab_size)
        identity = {
            "corpus_hash": manifest.corpus_hash,
            "seq_len": cfg.train.seq_len,
            "seed": cfg.seed,
            "packing": cfg.mixture.packing.value,
            "vocab_rows": self.vocab_rows,
        }
        earlier_corpora = [removal["corpus_hash_before"] for removal in manifest.removed]
        self.resume_from = self._choose_checkpoint(identity, earlier_corpora)
        found = Progress.from_json(read_manifest(self.resume_from)["progress"]) if self.resume_from else Progress()
        rank.first_does(lambda: require_space(run_dir, cfg, self.vocab_rows, found.step))
        self.progress, self.shape = found, step_shape(cfg)
        self.phases, self.mixtures = plan_phases(
            found.phases,
            cfg.mixture,
            manifest.tokens_by_part(TRAIN),
            position=int(unskipped(cfg.train.first_sample(found.step), found.skipped)),
            end_position=cfg.train.first_sample(cfg.train.steps),
            seq_len=cfg.train.seq_len,
        )

        decoder = Decoder(cfg.model, self.vocab_rows, cfg.engine.recompute)
        if self.resume_from is None:
            init_weights(decoder, cfg.seed)
        self.engine = Engine(decoder, cfg, rank)
        self.metrics = Metrics(run_dir, cfg, rank, found.step)
        self.samples = Samples(corpus_dir, self.phases, cfg.train.seq_len, cfg.seed, cfg.mixture.packing)
        self.held_out = valid_documents(corpus_dir)
        self.flops_per_token = flops_per_token(cfg.model, self.vocab_rows, cfg.train.seq_len)
        self.peak_flops = peak_flops(cfg, rank)
        keep = cfg.train.keep_checkpoints, cfg.train.keep_every_steps
        self.saver = Saver(run_dir, self.engine, rank, identity, keep, self.metrics.terminal.say)

    def _verify_corpus(self, corpus_dir: Path) -> None:
        """Every shard is there, and those that changed since they were last hashed are what the manifest says."""
        rank, marks = self.rank, dict[str, list[int]]()
        rank.first_does(lambda: marks.update(corpus.marks(corpus_dir)))
        last = self.ledger.last("corpus_verified", path=str(corpus_dir)) if rank.is_first else None
        known = last["marks"] if last else {}
        changed = rank.tell(sorted(name for name, mark in marks.items() if known.get(name) != mark))

        def share() -> Iterator[str]:
            for name in changed[rank.rank :: rank.world_size]:
                self.watchdog.alive()  # each may take a while, and all of them longer than a hang
                yield name

        rank.together(lambda: corpus.verify_files(corpus_dir, share()))
        if rank.is_first and changed:
            self.ledger.append("corpus_verified", path=str(corpus_dir), files=len(changed), marks=marks)

    def _choose_checkpoint(self, identity: dict[str, Any], earlier_corpora: list[str]) -> Path | None:
        """The checkpoint to go on from; what is wrong with newer ones is told and recorded."""
        if self.rank.is_first:
            remove_unfinished(self.run_dir)
        found, complaints = newest_usable(self.run_dir, self.rank)
        if found is None and not complaints and self.cfg.train.begin_from:
            return self._begin_from(identity, earlier_corpora)

        def judge() -> None:
            for complaint in complaints:
                print(f"not used: {complaint}", flush=True)
                self.ledger.append("checkpoint_damaged", complaint=complaint)
            if found is not None:
                require_identity(found, identity, earlier_corpora)
            elif complaints:
                lost = f"none of {len(complaints)} checkpoints in {self.run_dir / 'checkpoints'} is whole"
                repair = "bring one back, from a copy or `marathon move`; or move the folder away to begin again"
                raise UserError(lost, "a run does not begin again over what may be saved yet", repair)

        self.rank.first_does(judge)
        return found

    def _begin_from(self, identity: dict[str, Any], earlier_corpora: list[str]) -> Path:
        """Makes another run's checkpoint the first of this one; `UserError` where it is not what this run is to be."""
        source = self.run_dir.parent / self.cfg.train.begin_from

        def take() -> None:
            require_identity(source, identity, earlier_corpora)
            done = {key: read_manifest(source)["progress"][key] for key in ("step", "tokens")}
            self.ledger.append("begun_from", path=str(source), sha256=checkpoint_sha256(source), **done)
            adopt(source, self.run_dir)

        self.rank.first_does(lambda: require_fit(self.cfg, source))
        self.rank.together(lambda: verify_files(source, self.rank.rank, self.rank.world_size))
        self.rank.first_does(take)
        return self.run_dir / "checkpoints" / source.name
