"""Evaluates the checkpoints of a run: bits per byte on held-out documents, then the question suite.

All ranks take part; their number changes no figure by more than rounding. What has been evaluated is passed over.
"""

import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from configs.enums import Device, Precision
from configs.errors import EXIT_MISTAKE, UserError
from configs.schema import RunConfig
from data.heldout import ValidDocument
from eval.results import family_means, read_results, write_result
from eval.suites import build_suite
from eval.validation import bits_per_byte, gather_scores, mean_bpb, score_documents
from ledger import host
from ledger.progress import Progress
from ledger.record import Ledger
from model.decoder import Decoder
from model.weights import checkpoint_sha256, list_checkpoints, load_decoder, read_manifest, verify_files


def evaluate(
    cfg: RunConfig, run_dir: Path, *, documents: Sequence[ValidDocument], tokenizer_dir: Path, corpus_hash: str
) -> None:
    """Evaluates every checkpoint, step 0 included, that has no result yet; under torchrun or srun, as one of the ranks.

    The suite asks in the languages of `documents` and stands in RUN/eval. Raises `UserError` where there is no
    checkpoint or no document, or a file of a checkpoint is damaged; no rank goes on then.
    """
    torch.set_num_threads(cfg.cluster.cpus_per_device)
    ranks = PartialState(cpu=cfg.cluster.device is Device.cpu, timeout=timedelta(seconds=cfg.engine.timeout_s))
    # Only rank 0 looks: were the others a moment late to see a file, they would wait for each other for ever.
    look = partial(_plan, cfg, run_dir, documents, corpus_hash) if ranks.is_main_process else lambda: None
    suite_dir, tasks, hashes, to_do = _together(ranks, look)
    ask = partial(_ask, cfg, suite_dir, tasks, tokenizer_dir)
    with Progress("evaluating", "checkpoints", len(to_do), shown=ranks.is_main_process) as progress:
        for checkpoint in to_do:
            result = hashes | _figures(cfg, checkpoint, documents, ask, ranks)
            if ranks.is_main_process:
                write_result(run_dir, result)
                _record(run_dir, result)
                families = result["families"].items()
                told = [f"{name} {means['acc']:.3f} (chance {means['chance']:.2f})" for name, means in families]
                bpb = f"{result['bpb_mean']:.4f} bits per byte over {len(result['bpb'])} languages"
                progress.say(f"{checkpoint.name}: {', '.join([bpb, *told])}, {result['wall_s']:.1f} s")
            progress.advance()
    ranks.destroy_process_group()


def _together(ranks: PartialState, look: Callable[[], Any]) -> Any:
    """What `look` finds on the first rank; where any rank finds a mistake, the first one tells it and all end."""
    try:
        found = look()
    except UserError as error:
        found = error
    shares = gather_object([found])
    if mistakes := [share for share in shares if isinstance(share, UserError)]:
        raise mistakes[0] if ranks.is_main_process else SystemExit(EXIT_MISTAKE)
    return shares[0]


def _plan(
    cfg: RunConfig, run_dir: Path, documents: Sequence[ValidDocument], corpus_hash: str
) -> tuple[Path, list[str], dict[str, str], list[Path]]:
    """The suite's folder and tasks, the hashes of what is asked, and the checkpoints that have no result."""
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        raise UserError(f"{run_dir} has no checkpoint", "evaluation is of checkpoints", "run `marathon train` first")
    if not documents:
        found = f"corpus.holdout = {cfg.corpus.holdout} kept no document"
        rule = "bits per byte are measured on held-out documents"
        raise UserError(found, rule, "corpus.holdout.share=0.001, and prepare the corpus again")
    suite_dir = build_suite(cfg.suite, {document.lang for document in documents}, run_dir / "eval")
    suite = json.loads((suite_dir / "suite.json").read_text(encoding="utf-8"))
    hashes, to_do = {"suite_hash": suite["hash"], "corpus_hash": corpus_hash}, []
    results = {result["checkpoint"]: result for result in read_results(run_dir)}
    for checkpoint in checkpoints:
        identity, result = hashes | {"model_sha256": checkpoint_sha256(checkpoint)}, results.get(checkpoint.name, {})
        if identity.items() <= result.items():
            _record(run_dir, result)
        else:
            to_do.append(checkpoint)
    print(f"{len(to_do)} of {len(checkpoints)} checkpoints to evaluate", flush=True)
    return suite_dir, list(suite["tasks"]), hashes, to_do


def _figures(
    cfg: RunConfig, checkpoint: Path, documents: Sequence[ValidDocument], ask: Callable[..., Any], ranks: PartialState
) -> dict[str, Any]:
    begin, rank, world_size = time.monotonic(), ranks.process_index, ranks.num_processes
    _together(ranks, partial(verify_files, checkpoint, rank, world_size))
    decoder, model_sha256 = load_decoder(checkpoint, cfg)
    # In the format in which training computes, so that the last validation of training shows the same figures.
    decoder = decoder.to(ranks.device, torch.bfloat16 if cfg.engine.precision is Precision.bf16 else torch.float32)
    sizes = {"seq_len": cfg.train.seq_len, "batch_seqs": cfg.suite.batch_seqs}
    scores = score_documents(decoder, documents, **sizes, device=ranks.device, rank=rank, world_size=world_size)
    by_lang = bits_per_byte(gather_scores(scores), bootstrap_samples=cfg.suite.bootstrap_samples)
    suite, progress, hardware = ask(decoder), read_manifest(checkpoint)["progress"], host.hardware()
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else hardware["processor"]
    return {
        "checkpoint": checkpoint.name,
        "step": progress["step"],
        "tokens": progress["tokens"],
        "model_sha256": model_sha256,
        "bpb": {lang: entry._asdict() for lang, entry in by_lang.items()},
        "bpb_mean": mean_bpb(by_lang),
        "window": cfg.train.seq_len,
        **suite,
        "families": family_means(suite["tasks"]),
        "software": host.software(),
        "hardware": hardware | {"device": device},
        "precision": cfg.engine.precision.value,
        "world_size": world_size,
        "wall_s": round(time.monotonic() - begin, 3),
    }


def _ask(cfg: RunConfig, suite_dir: Path, tasks: list[str], tokenizer_dir: Path, decoder: Decoder) -> dict[str, Any]:
    """The suite's figures. Without questions, neither transformers nor lm-eval is loaded, which takes each rank 4 s."""
    if not tasks:
        return {"tasks": {}, "prompt_sha256": ""}
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from eval.harness import run_suite
    from model.hf import to_transformers

    disable_progress_bar()  # one for each model and rank
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = to_transformers(decoder, seq_len=cfg.train.seq_len, **ids)
    return run_suite(model, tokenizer, suite_dir, tasks, batch_seqs=cfg.suite.batch_seqs)


def _record(run_dir: Path, result: dict[str, Any]) -> None:
    """One ledger line a result, also where a kill came between the file and the line."""
    told = ("checkpoint", "step", "tokens", "model_sha256", "suite_hash", "corpus_hash", "bpb_mean", "families")
    facts, ledger = {name: result[name] for name in (*told, "wall_s", "hardware", "world_size")}, Ledger(run_dir)
    if ledger.last("evaluation", **facts) is None:
        ledger.append("evaluation", **facts)
