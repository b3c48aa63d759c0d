"""The release stage: export the last checkpoint, write its card, verify, and only then give it its name."""

import json
import shutil
import tempfile
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from configs.enums import Precision
from configs.schema import RunConfig
from data.heldout import ValidDocuments
from ledger.record import Ledger
from model.weights import file_sha256, list_checkpoints, load_decoder, verify_files
from release.card import write_card
from release.export import export_folder
from release.verify import expect, verify_in_fresh_process

PROMPTS_PER_LANGUAGE = 2


def release(cfg: RunConfig, run_dir: Path, corpus_dir: Path) -> None:
    """Leaves RUN/release, a verified Hugging Face folder; an older one goes only when the new one is whole."""
    checkpoint = list_checkpoints(run_dir)[-1]
    verify_files(checkpoint)
    decoder, checkpoint_sha256 = load_decoder(checkpoint, cfg)
    beside = run_dir / ".release-in-progress"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    export_folder(decoder, cfg, corpus_dir, beside)
    write_card(cfg, run_dir, checkpoint_sha256, beside)
    with tempfile.TemporaryDirectory() as expected:
        if cfg.engine.precision is Precision.bf16:
            decoder.bfloat16().float()  # rounded as the export is, in fp32
        expect(decoder, _prompts(corpus_dir), cfg.train.seq_len, Path(expected))
        figures = verify_in_fresh_process(beside, Path(expected))
    (beside / "verified.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    sums = {path.name: file_sha256(path) for path in sorted(beside.iterdir())}
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items())
    (beside / "SHA256SUMS").write_text(lines, encoding="utf-8")
    final = run_dir / "release"
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    weights = {name: sha256 for name, sha256 in sums.items() if name.endswith(".safetensors")}
    facts = {"path": str(final), "checkpoint": checkpoint.name, "checkpoint_sha256": checkpoint_sha256}
    Ledger(run_dir).append("release", **facts, weights=weights, verified=figures)
    print(
        f"released {checkpoint.name} as {final}\n"
        f"verified in a fresh process: {figures['prompts']} prompts, token ids equal, greedy continuations equal, "
        f"logits within {figures['max_logit_difference']:.1e}",
        flush=True,
    )


def _prompts(corpus_dir: Path) -> list[tuple[str, list[int]]]:
    """Held-out texts of every language with their ids by sentencepiece, which knows nothing of the export."""
    pieces = SentencePieceProcessor(model_file=str(corpus_dir / "tokenizer" / "tokenizer.model"))
    held_out, prompts = ValidDocuments(corpus_dir), []
    for language in held_out.languages:
        for document in held_out.read(language)[:PROMPTS_PER_LANGUAGE]:
            text = pieces.decode(document.tokens[1:-1].tolist())
            prompts.append((text, [pieces.bos_id(), *pieces.encode(text)]))
    return prompts
