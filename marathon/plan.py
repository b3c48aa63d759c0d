"""What a run needs, from its config alone: parameters, operations, memory per device by part, tokens, steps."""

from dataclasses import replace
from pathlib import Path

from configs.enums import Device, Precision, Recompute
from configs.errors import UserError
from configs.schema import ModelConfig, RunConfig
from data.manifest import TRAIN, Manifest
from data.mixture import plan_phases, table
from data.pipeline import corpus_dir
from ledger.pages import render
from model.decoder import count_parameters, flops_per_token, padded_rows
from model.loss import CHUNK_LOGITS, ROWS
from train.optim import state_bytes
from train.retention import checkpoint_bytes, checkpoints_on_disk
from train.schedule import step_shape

ASSUMED_MFU = 0.35  # for the estimate of time only; published runs on these machines reach 0.25 to 0.6
USABLE_SHARE = 0.85
"""Of a device's memory; the rest is for libraries, communication, and gaps that the allocator leaves."""


def device_memory(cfg: RunConfig) -> dict[str, float]:
    """Estimates the bytes on one device, by part; what `USABLE_SHARE` leaves comes on top.

    Weights stay whole, but for ZeRO-3, which keeps its share and up to 1e9 parameters that are in use (the default of
    DeepSpeed's `max_live_parameters`). ZeRO-1 in bf16 keeps whole gradients in bf16 and in fp32 besides; the others
    keep their share in fp32 and pass the rest on in buckets. What the optimizer keeps in fp32 (master weights and
    moments, 12 bytes a parameter with AdamW) is shared out over all devices. The loss has a chunk of logits in fp32,
    in bf16 besides where that is what is computed in, the gradient of the output matrix in fp32, and that of the
    hidden states (model/loss.py). Devices that share matrices have their part of heads and inner
    widths, those that share sequences of the tokens; a group that has weights whole, one copy over its devices.
    """
    rows, engine = padded_rows(cfg.tokenizer.vocab_size), cfg.engine
    parts, model = engine.tensor_parallel, cfg.model
    model = replace(model, n_head=model.n_head // parts, n_kv_head=model.n_kv_head // parts, d_ff=model.d_ff // parts)
    parameters = count_parameters(model, rows)
    world, stage = cfg.cluster.world_size // parts, engine.zero_stage
    bytes_each = 4 if engine.precision is Precision.fp32 else 2
    tokens = step_shape(cfg).micro_batch_seqs * cfg.train.seq_len // engine.sequence_parallel
    chunk = min(tokens * rows, CHUNK_LOGITS["cpu" if cfg.cluster.device is Device.cpu else "cuda"])
    whole_gradients = parameters * (4 if bytes_each == 4 else 6)
    live_weights = parameters if stage < 3 else parameters / world + min(parameters, 10**9)
    if engine.shard_group:
        live_weights += parameters / engine.shard_group
    return {
        "weights": bytes_each * live_weights,
        "gradients": parameters * 4 / world if stage > 1 else whole_gradients,
        "optimizer": state_bytes(cfg, rows) / cfg.cluster.world_size,
        "buckets": min(cfg.engine.bucket_elements, parameters) * 4 * 2,
        "activations": tokens * activation_bytes_per_token(model, bytes_each, engine.recompute),
        "loss": chunk * (4 if bytes_each == 4 else 6)
        + model.d_model * (rows * 4 + (tokens + min(rows, ROWS)) * bytes_each),
    }


def activation_bytes_per_token(model: ModelConfig, bytes_each: int, recompute: Recompute) -> float:
    """What is there for the backward pass at the most, in bytes a token; a test compares it with what PyTorch holds.

    One block is there whole, while it is differentiated; of the others there is what `recompute` keeps. A norm keeps
    its input in fp32, the normed value, and the scaled value that goes into the next product; those of queries and keys
    keep the turned value instead. SwiGLU keeps four tensors of the inner width. Where things are computed again, the
    input of a block is kept, and with selective the results of its products and of attention.
    """
    norm = 4 + 2 * bytes_each
    query, key = model.n_head * model.head_dim, model.n_kv_head * model.head_dim
    attention = (query + key) * norm + (key + query) * bytes_each
    whole = 2 * model.d_model * norm + attention + 4 * model.d_ff * bytes_each
    kept = {
        Recompute.none: whole,
        Recompute.selective: (3 * model.d_model + 2 * query + 2 * key + 2 * model.d_ff) * bytes_each + 4 * model.n_head,
        Recompute.full: model.d_model * bytes_each,
    }
    return (model.n_layer - 1) * kept[recompute] + whole + model.d_model * norm


def plan_text(cfg: RunConfig) -> str:
    """The plan as lines for the terminal."""
    rows = padded_rows(cfg.tokenizer.vocab_size)
    tokens = cfg.train.first_sample(cfg.train.steps) * cfg.train.seq_len
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
        usable_share=USABLE_SHARE,
        n_checkpoints=checkpoints_on_disk(cfg.train),
        checkpoint_gib=checkpoint_bytes(cfg) / 2**30,
    ).rstrip()


def mixture_text(cfg: RunConfig) -> str:
    """All phases of the mixture, where the corpus has been prepared; raises `UserError` where they cannot be kept."""
    try:
        manifest = Manifest.load(corpus_dir(cfg))
    except UserError as error:
        return f"mixture       is planned when there is a corpus: {error.found}"
    end = cfg.train.first_sample(cfg.train.steps)
    available = manifest.tokens_by_part(TRAIN)
    _, mixtures = plan_phases([], cfg.mixture, available, position=0, end_position=end, seq_len=cfg.train.seq_len)
    return table(mixtures)
