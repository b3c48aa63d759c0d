"""What a run needs, from its config alone: parameters, operations, memory per device by part, tokens, steps."""

from dataclasses import dataclass

from configs.enums import Precision
from configs.schema import ModelConfig, RunConfig
from model.decoder import padded_rows
from model.flops import count_parameters, flops_per_token
from train.batch import step_shape
from train.retention import checkpoint_bytes, checkpoints_on_disk

ASSUMED_MFU = 0.35
"""For the estimate of time only; published runs on these machines reach 0.25 to 0.6."""


MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default for ZeRO-3."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by part."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Sum of the parts; the allocator's fragmentation and the libraries come on top."""
        return sum(vars(self).values())


def device_memory(cfg: RunConfig) -> Memory:
    """Estimates memory of one device.

    Weights stay whole, but for ZeRO-3, which keeps its share and up to 1e9 parameters that are in use (DeepSpeed's
    `max_live_parameters`). ZeRO-1 in bf16 keeps whole gradients in bf16 and in fp32 besides; the others keep their
    share in fp32 and pass the rest on in buckets. The optimizer's 12 bytes a parameter (master weight and two
    moments in fp32) are shared out over all devices. No activations are recomputed.
    """
    rows = padded_rows(cfg.tokenizer.vocab_size)
    parameters = count_parameters(cfg.model, rows)
    world, stage = cfg.cluster.world_size, cfg.engine.zero_stage
    bytes_each = 4 if cfg.engine.precision is Precision.fp32 else 2
    tokens = step_shape(cfg).micro_batch_seqs * cfg.train.seq_len
    whole_gradients = parameters * (4 if bytes_each == 4 else 6)
    return Memory(
        weights=bytes_each * (parameters if stage < 3 else parameters / world + min(parameters, MAX_LIVE_PARAMETERS)),
        gradients=parameters * 4 / world if stage > 1 else whole_gradients,
        optimizer=parameters * 12 / world,
        buckets=min(cfg.engine.bucket_elements, parameters) * 4 * 2,
        activations=tokens * activation_bytes_per_token(cfg.model, bytes_each),
        # The logits, their copy in fp32, and the gradient of it.
        logits=tokens * rows * (bytes_each + 4 + 4),
    )


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
    parameters = count_parameters(cfg.model, rows)
    tokens = cfg.train.steps * cfg.train.tokens_per_step
    flops = flops_per_token(cfg.model, rows, cfg.train.seq_len) * tokens
    memory = device_memory(cfg)
    lines = [
        f"run           {cfg.name} on {cfg.cluster.name}: "
        f"{cfg.cluster.world_size} devices, {cfg.cluster.devices_per_node} a node",
        f"parameters    {parameters:,} ({parameters - rows * cfg.model.d_model:,} without the input embedding)",
        f"tokens        {tokens:,} = {cfg.train.steps:,} steps x {cfg.train.tokens_per_step:,} "
        f"({tokens / parameters:.1f} a parameter)",
        f"step          {step_shape(cfg)}",
        f"compute       {flops:.3g} FLOPs of forward and backward; "
        f"6 x parameters x tokens = {6 * parameters * tokens:.3g}",
        _time_line(cfg, flops),
        f"memory        of one device, ZeRO-{cfg.engine.zero_stage}, {cfg.engine.precision.value}:",
        *(f"  {name:<12}{size / 2**30:>9.2f} GiB" for name, size in vars(memory).items()),
        f"  {'total':<12}{memory.total / 2**30:>9.2f} GiB of {cfg.cluster.device_memory_gib:.0f} GiB",
        f"disk          {checkpoints_on_disk(cfg.train)} checkpoints of {checkpoint_bytes(cfg) / 2**30:,.2f} GiB",
    ]
    if memory.total > cfg.cluster.device_memory_gib * 2**30:
        lines.append("WARNING       this does not fit: train.max_micro_batch_seqs=1, engine=zero2, or more devices")
    return "\n".join(lines)


def _time_line(cfg: RunConfig, flops: float) -> str:
    if not cfg.cluster.peak_tflops:
        return "time          depends on this processor: its peak is measured when the run starts"
    device_hours = flops / (cfg.cluster.peak_tflops * 1e12 * ASSUMED_MFU) / 3600
    return (
        f"time          {device_hours:,.0f} device-hours, {device_hours / cfg.cluster.world_size:,.1f} hours, at an "
        f"assumed MFU of {ASSUMED_MFU:.0%} of {cfg.cluster.peak_tflops} TFLOP/s"
    )
