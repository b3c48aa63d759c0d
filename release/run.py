"""The release stage: export the last checkpoint, write its card, verify, and only then give it its name."""

import json
import shutil
import tempfile
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from sentencepiece import SentencePieceProcessor

from configs.enums import Precision
from configs.schema import RunConfig
from data.heldout import valid_documents
from data.manifest import Manifest
from eval.results import read_results
from ledger.pages import render
from ledger.record import Ledger
from model.decoder import Decoder
from model.hf import to_their_config, to_their_state
from model.weights import file_sha256, list_checkpoints, load_decoder, verify_files
from release.verify import expect, verify_in_fresh_process

PROMPTS_PER_LANGUAGE = 2
CARD_EVENTS = ("corpus", "begun_from", "train_start", "train_end", "checkpoint")


def release(cfg: RunConfig, run_dir: Path, corpus_dir: Path) -> None:
    """Leaves RUN/release, a verified Hugging Face folder; an older one goes only when the new one is whole."""
    checkpoint = list_checkpoints(run_dir)[-1]
    verify_files(checkpoint)
    decoder, checkpoint_sha256 = load_decoder(checkpoint, cfg)
    beside = run_dir / ".release-in-progress"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    if cfg.engine.precision is Precision.bf16:
        decoder.bfloat16()  # as the run computed; rounded once, from the master weights
    export_folder(decoder, cfg, corpus_dir, beside)
    write_card(cfg, run_dir, checkpoint_sha256, beside)
    with tempfile.TemporaryDirectory() as expected:
        expect(decoder.float(), _prompts(corpus_dir), cfg.train.seq_len, Path(expected))
        figures = verify_in_fresh_process(beside, Path(expected))
    _write_json(beside / "verified.json", figures)
    sums = {path.name: file_sha256(path) for path in sorted(beside.iterdir())}
    (beside / "SHA256SUMS").write_text("".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()))
    final = run_dir / "release"
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    weights = {name: sha256 for name, sha256 in sums.items() if name.endswith(".safetensors")}
    facts = {"path": str(final), "checkpoint": checkpoint.name, "checkpoint_sha256": checkpoint_sha256}
    Ledger(run_dir).append("release", **facts, weights=weights, verified=figures)
    told = f"{figures['prompts']} prompts, token ids equal, greedy continuations equal, logits within"
    print(f"released {checkpoint.name} as {final}")
    print(f"verified in a fresh process: {told} {figures['max_logit_difference']:.1e}", flush=True)


def export_folder(decoder: Decoder, cfg: RunConfig, corpus_dir: Path, folder: Path) -> None:
    """Fills a folder with what transformers, vLLM, SGLang and llama.cpp read; weights are in the decoder's dtype.

    config.json is written by us and not by `save_pretrained`, which leaves out what transformers 4 reads.
    """
    tokenizer = Manifest.load(corpus_dir).tokenizer
    save_torch_state_dict(to_their_state(decoder.state_dict()), folder, max_shard_size="5GB", metadata={"format": "pt"})
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    _write_json(folder / "config.json", to_their_config(decoder, seq_len=cfg.train.seq_len, **ids))
    # Written out, since what transformers derives by itself is marked as such and then changes with its version.
    generation = {name.replace("_", "_token_"): id_ for name, id_ in ids.items()} | {"do_sample": False}
    _write_json(folder / "generation_config.json", generation)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(corpus_dir / "tokenizer" / name, folder / name)


def write_card(cfg: RunConfig, run_dir: Path, checkpoint_sha256: str, folder: Path) -> None:
    """Writes README.md with its YAML head: a rendering of ledger and evaluations, whose words are in card.md.j2."""
    facts = {event: Ledger(run_dir).last(event) for event in CARD_EVENTS}
    evaluation = next(reversed(read_results(run_dir)), None)
    template = Path(__file__).with_name("card.md.j2")
    page = render(template, cfg=cfg, checkpoint_sha256=checkpoint_sha256, evaluation=evaluation, **facts)
    (folder / "README.md").write_text(page, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _prompts(corpus_dir: Path) -> list[tuple[str, list[int]]]:
    """Held-out texts of every language with their ids by sentencepiece, which knows nothing of the export."""
    pieces = SentencePieceProcessor(model_file=str(corpus_dir / "tokenizer" / "tokenizer.model"))
    prompts = []
    for _, documents in groupby(valid_documents(corpus_dir), key=attrgetter("lang")):
        for document in islice(documents, PROMPTS_PER_LANGUAGE):
            text = pieces.decode(document.tokens[1:-1].tolist())
            prompts.append((text, [pieces.bos_id(), *pieces.encode(text)]))
    return prompts
