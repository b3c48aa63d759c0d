"""What a run needs, from its config alone: parameters, operations, memory per device by part, tokens, steps."""

from pathlib import Path

from configs.enums import Precision
from configs.errors import UserError
from configs.schema import ModelConfig, RunConfig
from data.manifest import TRAIN, Manifest
from data.mixture import plan_phases, table
from data.pipeline import corpus_dir
from ledger.pages import render
from model.decoder import count_parameters, flops_per_token, padded_rows
from train.optim import state_bytes
from train.retention import checkpoint_bytes, checkpoints_on_disk
from train.schedule import step_shape

ASSUMED_MFU = 0.35
"""For the estimate of time only; published runs on these machines reach 0.25 to 0.6."""


def device_memory(cfg: RunConfig) -> dict[str, float]:
    """Estimates the bytes on one device, by part; the allocator's fragmentation and the libraries come on top.

    Weights stay whole, but for ZeRO-3, which keeps its share and up to 1e9 parameters that are in use (the default of
    DeepSpeed's `max_live_parameters`). ZeRO-1 in bf16 keeps whole gradients in bf16 and in fp32 besides; the others
    keep their share in fp32 and pass the rest on in buckets. What the optimizer keeps in fp32 (master weights and
    moments, 12 bytes a parameter with AdamW) is shared out over all devices. No activations are recomputed.
    """
    rows = padded_rows(cfg.tokenizer.vocab_size)
    parameters = count_parameters(cfg.model, rows)
    world, stage = cfg.cluster.world_size, cfg.engine.zero_stage
    bytes_each = 4 if cfg.engine.precision is Precision.fp32 else 2
    tokens = step_shape(cfg).micro_batch_seqs * cfg.train.seq_len
    whole_gradients = parameters * (4 if bytes_each == 4 else 6)
    live_weights = parameters if stage < 3 else parameters / world + min(parameters, 10**9)
    return {
        "weights": bytes_each * live_weights,
        "gradients": parameters * 4 / world if stage > 1 else whole_gradients,
        "optimizer": state_bytes(cfg, rows) / world,
        "buckets": min(cfg.engine.bucket_elements, parameters) * 4 * 2,
        "activations": tokens * activation_bytes_per_token(cfg.model, bytes_each),
        # The logits, their copy in fp32, and the gradient of it.
        "logits": tokens * rows * (bytes_each + 4 + 4),
    }


def activation_bytes_per_token(model: ModelConfig, bytes_each: int) -> float:
    """What the blocks keep for the backward pass, in bytes a token; a test compares it with what autograd saves.

    A norm keeps its input in fp32, the normed value, and the scaled value that goes into the next product; those
    of queries and keys keep the turned value instead. SwiGLU keeps four tensors of the inner width.
    """
    norm = 4 + 2 * bytes_each
    query, key = model.n_head * model.head_dim, model.n_kv_head * model.head_dim
    attention = (query + key) * norm + (key + query) * bytes_each
    return model.n_layer * (2 * model.d_model * norm + attention + 4 * model.d_ff * bytes_each)


def plan_text(cfg: RunConfig) -> str:
    """The plan as lines for the terminal."""
    rows = padded_rows(cfg.tokenizer.vocab_size)
    tokens = cfg.train.steps * cfg.train.tokens_per_step
    flops = flops_per_token(cfg.model, rows, cfg.train.seq_len) * tokens
    assumed_flops_per_s = cfg.cluster.peak_tflops * 1e12 * ASSUMED_MFU
    return render(
        Path(__file__).with_name("plan.txt.j2"),
        cfg=cfg,
        rows=rows,
        parameters=count_parameters(cfg.model, rows),
        tokens=tokens,
        flops=flops,
        step=step_shape(cfg),
        assumed_mfu=ASSUMED_MFU,
        device_hours=flops / assumed_flops_per_s / 3600 if assumed_flops_per_s else None,
        memory=device_memory(cfg),
        n_checkpoints=checkpoints_on_disk(cfg.train),
        checkpoint_gib=checkpoint_bytes(cfg) / 2**30,
    ).rstrip()


def mixture_text(cfg: RunConfig) -> str:
    """All phases of the mixture, where the corpus has been prepared; raises `UserError` where they cannot be kept."""
    try:
        manifest = Manifest.load(corpus_dir(cfg))
    except UserError as error:
        return f"mixture       is planned when there is a corpus: {error.found}"
    end = cfg.train.steps * cfg.train.seqs_per_step
    available = manifest.tokens_by_part(TRAIN)
    _, mixtures = plan_phases([], cfg.mixture, available, position=0, end_position=end, seq_len=cfg.train.seq_len)
    return table(mixtures)
