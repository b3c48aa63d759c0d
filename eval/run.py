"""Evaluates the checkpoints of a run: bits per byte on held-out documents, then the question suite.

All ranks take part, whatever their number: it does not change a figure by more than rounding. Rank 0 writes
RUN/eval/CHECKPOINT.json and one line to the ledger, and prints. What has been evaluated is passed over, so the
same command goes on after a kill.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from configs.enums import Device, Precision
from configs.errors import EXIT_MISTAKE, UserError
from configs.schema import RunConfig
from eval.results import Identity, family_means, read_result, result_path, write_result
from eval.suites import build_suite
from eval.validation import Document, bits_per_byte, gather_scores, mean_bpb, score_documents
from ledger import host
from ledger.progress import Progress
from ledger.record import Ledger
from model.decoder import Decoder
from model.weights import checkpoint_sha256, list_checkpoints, load_decoder, read_manifest, verify_files


def evaluate(
    cfg: RunConfig,
    run_dir: Path,
    *,
    documents: Sequence[Document],
    tokenizer_dir: Path,
    corpus_hash: str,
) -> None:
    """Evaluates every checkpoint, step 0 included, that has no result yet.

    Under torchrun or srun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) this is one of the ranks. The
    suite asks in the languages of `documents` and stands in RUN/eval. Raises `UserError` on all ranks where there
    is no checkpoint or no document.
    """
    torch.set_num_threads(cfg.cluster.cpus_per_device)
    ranks = PartialState(cpu=cfg.cluster.device is Device.cpu, timeout=timedelta(seconds=cfg.engine.timeout_s))
    plan: list[Any] = [None]
    error = None
    if ranks.is_main_process:
        try:
            plan = [_plan(cfg, run_dir, documents, corpus_hash)]
        except UserError as found:
            error = found
    # Only rank 0 looks: were the others a moment late to see a file, they would wait for each other for ever.
    broadcast_object_list(plan)
    if plan[0] is None:
        raise error or SystemExit(1)
    suite_dir, to_do = plan[0]
    with Progress("evaluating", "checkpoints", len(to_do), shown=ranks.is_main_process) as progress:
        for checkpoint in to_do:
            result = _evaluate_checkpoint(cfg, checkpoint, suite_dir, documents, tokenizer_dir, corpus_hash, ranks)
            if ranks.is_main_process:
                write_result(result_path(run_dir, checkpoint.name), result)
                _record(run_dir, result)
                progress.say(_line(result))
            progress.advance()
    ranks.destroy_process_group()


def _plan(cfg: RunConfig, run_dir: Path, documents: Sequence[Document], corpus_hash: str) -> tuple[Path, list[Path]]:
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise UserError(
            f"{run_dir} has no checkpoint", "checkpoints are what is evaluated", "run `marathon train` first"
        )
    if not documents:
        raise UserError(
            f"corpus.holdout = {cfg.corpus.holdout} kept no document",
            "bits per byte are measured on held-out documents",
            "corpus.holdout.share=0.001, and prepare the corpus again",
        )
    suite_dir = build_suite(cfg.suite, {document.lang for document in documents}, run_dir / "eval")
    suite_hash = _suite_index(suite_dir)["hash"]
    to_do = []
    for checkpoint in checkpoints:
        result = read_result(
            result_path(run_dir, checkpoint.name), Identity(checkpoint_sha256(checkpoint), suite_hash, corpus_hash)
        )
        if result is None:
            to_do.append(checkpoint)
        else:
            _record(run_dir, result)
    print(f"{len(to_do)} of {len(checkpoints)} checkpoints to evaluate", flush=True)
    return suite_dir, to_do


def _verify_together(checkpoint: Path, ranks: PartialState) -> None:
    """Each rank hashes its share of the files; the first one tells what is wrong, and no rank goes on."""
    complaint = None
    try:
        verify_files(checkpoint, ranks.process_index, ranks.num_processes)
    except UserError as error:
        complaint = (error.found, error.rule, error.repair)
    found = [c for c in gather_object([complaint]) if c]
    if found:
        raise UserError(*found[0]) if ranks.is_main_process else SystemExit(EXIT_MISTAKE)


def _evaluate_checkpoint(
    cfg: RunConfig,
    checkpoint: Path,
    suite_dir: Path,
    documents: Sequence[Document],
    tokenizer_dir: Path,
    corpus_hash: str,
    ranks: PartialState,
) -> dict[str, Any]:
    start = time.monotonic()
    index = _suite_index(suite_dir)
    _verify_together(checkpoint, ranks)
    decoder, model_sha256 = load_decoder(checkpoint, cfg)
    # In the format in which training computes, so that the last validation of training shows the same figures.
    decoder = decoder.to(ranks.device, torch.bfloat16 if cfg.engine.precision is Precision.bf16 else torch.float32)
    scores = score_documents(
        decoder,
        documents,
        seq_len=cfg.train.seq_len,
        batch_seqs=cfg.suite.batch_seqs,
        device=ranks.device,
        rank=ranks.process_index,
        world_size=ranks.num_processes,
    )
    bpb = bits_per_byte(gather_scores(scores), bootstrap_samples=cfg.suite.bootstrap_samples)
    suite = _ask(decoder, cfg, suite_dir, index["tasks"], tokenizer_dir)
    progress = read_manifest(checkpoint)["progress"]
    return {
        "checkpoint": checkpoint.name,
        "step": progress["step"],
        "tokens": progress["tokens"],
        **asdict(Identity(model_sha256, index["hash"], corpus_hash)),
        "bpb": {lang: asdict(entry) for lang, entry in bpb.items()},
        "bpb_mean": mean_bpb(bpb),
        "window": cfg.train.seq_len,
        **suite,
        "families": family_means(suite["tasks"]),
        "software": host.software(),
        "hardware": {**host.hardware(), "device": _device_name(ranks.device)},
        "precision": cfg.engine.precision.value,
        "world_size": ranks.num_processes,
        "wall_s": round(time.monotonic() - start, 3),
    }


def _ask(
    decoder: Decoder, cfg: RunConfig, suite_dir: Path, tasks: dict[str, Any], tokenizer_dir: Path
) -> dict[str, Any]:
    """The suite's figures. Without questions, neither transformers nor lm-eval is loaded, which takes each rank 4 s."""
    if not tasks:
        return {"tasks": {}, "prompt_sha256": ""}
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from eval.harness import run_suite
    from model.hf import to_transformers

    disable_progress_bar()  # one for each model and rank
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = to_transformers(
        decoder,
        seq_len=cfg.train.seq_len,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    return run_suite(model, tokenizer, suite_dir, tasks, batch_seqs=cfg.suite.batch_seqs)


def _suite_index(suite_dir: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((suite_dir / "suite.json").read_text(encoding="utf-8"))
    return index


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(host.hardware()["processor"])


def _record(run_dir: Path, result: dict[str, Any]) -> None:
    """One ledger line a result, also where a kill came between the file and the line."""
    told = (
        "checkpoint",
        "step",
        "tokens",
        "model_sha256",
        "suite_hash",
        "corpus_hash",
        "bpb_mean",
        "families",
        "wall_s",
    )
    facts = {name: result[name] for name in told}
    ledger = Ledger(run_dir)
    if ledger.last("evaluation", **facts) is None:
        ledger.append("evaluation", **facts, hardware=result["hardware"], world_size=result["world_size"])


def _line(result: dict[str, Any]) -> str:
    families = "".join(
        f", {name} {means['acc']:.3f} (chance {means['chance']:.2f})" for name, means in result["families"].items()
    )
    languages = len(result["bpb"])
    return (
        f"{result['checkpoint']}: {result['bpb_mean']:.4f} bits per byte over {languages} languages{families}, "
        f"{result['wall_s']:.1f} s"
    )
