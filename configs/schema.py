"""Every setting of a run: one dataclass a section, the meaning beneath each field.

Values stand in the YAML groups beside this file; the rules that a field has to keep by itself stand here, rules across
sections in `checks.py`. Fields without a default have to come from YAML or the command line.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from configs.enums import DecayShape, Device, Family, OptimizerName, Precision, Recompute, ScheduleName, WandbMode
from configs.rules import Decay, NaturalInt, PositiveFloat, PositiveInt, Rule, Section, Share, require
from configs.text import FACTOR, CorpusConfig, MixtureConfig, TasksConfig, TokenizerConfig


@dataclass
class ModelConfig(Section, prefix="model"):
    """The decoder: RMSNorm, RoPE, grouped queries, QK-norm, SwiGLU. Exported as Qwen3ForCausalLM."""

    n_layer: PositiveInt = MISSING
    """Transformer blocks."""
    d_model: PositiveInt = MISSING
    """Width of the residual stream."""
    n_head: PositiveInt = MISSING
    """Query heads."""
    n_kv_head: PositiveInt = MISSING
    """Key and value heads; each serves n_head / n_kv_head query heads."""
    head_dim: PositiveInt = MISSING
    """Width of one head."""
    d_ff: PositiveInt = MISSING
    """Inner width of the SwiGLU."""
    rope_theta: float = 500_000.0
    """Base of the rotary embedding."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of initial weights; layers that write to the residual divide it by sqrt(2 n_layer)."""
    tie_embeddings: bool = MISSING
    """One matrix for input and output embeddings; pays off below about 2B parameters."""
    mup_base_width: NaturalInt = 0
    """d_model of the small model that optim.lr and init_std were found with: they then serve every width where d_ff and
    heads grow alike (muP; what becomes of them: model/decoder.py, `width_factors`). 0: they are taken as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divisors = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
        require(
            self.n_head % self.n_kv_head == 0,
            f"model.n_head = {self.n_head}, model.n_kv_head = {self.n_kv_head}",
            "each key/value head serves the same number of query heads, so n_kv_head must divide n_head",
            f"model.n_kv_head one of {divisors}, or model.n_head a multiple of {self.n_kv_head}",
        )
        found, rule = f"model.head_dim = {self.head_dim}", "RoPE turns pairs of dimensions, so it must be even"
        require(self.head_dim % 2 == 0, found, rule, f"model.head_dim={self.head_dim + 1}")


@dataclass
class OptimConfig(Section, prefix="optim"):
    """The optimizer."""

    name: OptimizerName = OptimizerName.adamw
    """adamw; muon: orthogonal momentum for the matrices of blocks, AdamW with the same rate for the rest; ademamix:
    AdamW with a slow average of gradients beside the fast one."""
    lr: PositiveFloat = MISSING
    """Peak learning rate."""
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.95
    """Decay of the second moment."""
    momentum: Decay = 0.95
    """muon: decay of the momentum of matrices."""
    beta3: Decay = 0.9999
    """ademamix: decay of the slow average, to which it rises from beta1."""
    alpha: PositiveFloat = 8.0
    """ademamix: weight of the slow average, to which it rises from 0."""
    slow_warmup_steps: NaturalInt = 0
    """ademamix: steps in which both rise; 0: all steps, which are then better not changed on the way."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Share = 0.1
    """Decoupled decay, on matrices only: norms and embeddings are left out."""
    grad_clip: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""


@dataclass
class ScheduleConfig(Section, prefix="schedule"):
    """Learning rate over steps."""

    name: ScheduleName = MISSING
    """wsd (warm up, stay, decay) or cosine."""
    warmup_steps: NaturalInt = MISSING
    """Linear rise to the peak."""
    decay_share: Share = 0.2
    """wsd: share of all steps, at the end, in which the rate falls."""
    decay_shape: DecayShape = DecayShape.linear
    """wsd: how it falls. linear; sqrt: 1 - sqrt(progress), fast at first, with the lowest loss of those that Haegele et
    al. compare (arXiv 2405.18392); cosine: half a wave."""
    final_lr_share: Share = 0.0
    """Learning rate at the end, as a share of the peak."""


ZERO_STAGES = Rule(
    lambda stage: stage in (0, 1, 2, 3),
    "1, 2 and 3 are supported, and 0 chooses",
    "engine=auto; or 1 for small models, 2 from about 1.5B parameters, 3 where weights do not fit whole",
)


@dataclass
class EngineConfig(Section, prefix="engine"):
    """DeepSpeed."""

    zero_stage: Annotated[int, ZERO_STAGES] = MISSING
    """1 shards the optimizer; 2 shards gradients too; 3 shards weights too; 0: the cheapest that fits."""
    precision: Precision = MISSING
    """bf16 computes in bf16 over fp32 master weights; gradients are accumulated in fp32 in both."""
    comm_precision: Precision = Precision.fp32
    """Format of gradients in the all-reduce. fp32 is the reference: ZeRO stages then differ in
    the order of sums alone."""
    shard_group: NaturalInt = 0
    """ZeRO-3: weights are also held whole by each group of so many devices, a node's best, and gathered from there
    (ZeRO++ hpZ); 0: from all devices."""
    tensor_parallel: PositiveInt = 1
    """Devices that share each matrix of the blocks (AutoTP): for models above 8B, within a node."""
    sequence_parallel: PositiveInt = 1
    """Devices that share each sequence (Ulysses): each has some heads in attention, and a stretch of it otherwise."""
    recompute: Recompute = Recompute.none
    """What the backward pass computes again instead of keeping it: nothing; selective: all but the results of matrix
    products and attention; full: whole blocks, a third more work; auto: the cheapest that fits."""
    compile: bool = False
    """Compile each block with torch.compile; the first step then takes a minute or more."""
    bucket_elements: PositiveInt = 100_000_000
    """Gradients travel in buckets of so many numbers; 1e8 in fp32 is 400 MB."""
    timeout_s: PositiveInt = 1800
    """A step, or the time between two validation passes, that takes longer is a hang: every rank writes its stacks to
    RUN/logs and ends, so that the job starts again. Collectives wait a little longer than that."""

    @property
    def group_size(self) -> int:
        """Devices that work on the same sequences; neighbours in the order of ranks."""
        return self.tensor_parallel * self.sequence_parallel

    @property
    def layout(self) -> str:
        """How devices share the work, in words."""
        sizes = {name: getattr(self, name) for name in ("shard_group", "tensor_parallel", "sequence_parallel")}
        shared = [f"{name}={size}" for name, size in sizes.items() if size > 1]
        return ", ".join((f"ZeRO-{self.zero_stage}", *shared, f"recompute={self.recompute.value}"))


@dataclass
class RampConfig(Section, prefix="train.batch_ramp"):
    """A stretch of a run that has steps of another size than the run ends with."""

    until_tokens: PositiveInt = MISSING
    """It ends with the first step that reaches so many tokens, counted from the run's beginning."""
    tokens_per_step: PositiveInt = MISSING
    """Tokens in one optimizer step over all devices until then."""


@dataclass
class TrainConfig(Section, prefix="train"):
    """How much is trained, in what portions, and how often it is looked at."""

    tokens: PositiveInt = MISSING
    """Tokens to train on in all, repetitions counted."""
    tokens_per_step: PositiveInt = MISSING
    """Tokens in one optimizer step over all devices: the one batch size; the rest is derived from it."""
    batch_ramp: list[RampConfig] = field(default_factory=list)
    """Sizes of a step before that one, as [{until_tokens: 1_000_000_000, tokens_per_step: 1_048_576}]; none: always so.
    What stands at a position stays; how many positions a step takes is what changes."""
    seq_len: PositiveInt = MISSING
    """Tokens in one sequence, also the context length of the exported model."""
    z_loss: Annotated[float, FACTOR] = 0.0
    """Factor of z-loss, 1e-4 in PaLM (model/loss.py); losses that are told stay plain nats."""
    begin_from: str = ""
    """Checkpoint of another run to begin from, as OTHER/checkpoints/step-000080000 in SCRATCH/runs, or its whole path;
    empty: random weights."""
    max_micro_batch_seqs: PositiveInt = MISSING
    """Sequences a device takes in one forward pass at most; gradient accumulation makes up the rest."""
    validate_every_steps: PositiveInt = MISSING
    """Bits per byte by language on held-out documents, besides step 0 and the last."""
    save_every_steps: PositiveInt = MISSING
    """A checkpoint is written, besides step 0 and the last step."""
    keep_checkpoints: int = 0
    """Keep the newest so many besides step 0; 0 keeps all."""
    keep_every_steps: int = 0
    """With `keep_checkpoints`: keep those at multiples of this for good; 0 keeps none of them."""
    self_test: bool = True
    """Before the first step of a layout (devices, stage, precision): compare the engine's gradient of two small
    batches with that of one process in fp32."""
    log_every_steps: PositiveInt = 10
    """A line of metrics."""
    loader_workers: int = 0
    """Processes that read; with 0 a thread does. Both read ahead, and the order of samples does not depend on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, size in self.step_sizes:
            found, upward = f"{name} = {size}, train.seq_len = {self.seq_len}", -(-size // self.seq_len) * self.seq_len
            require(size % self.seq_len == 0, found, "a step is a whole number of sequences", f"{name}={upward}")
        ends = [stage.until_tokens for stage in self.batch_ramp]
        found, rule = f"train.batch_ramp ends at {ends} tokens", "each stage ends after the one before"
        require(ends == sorted(set(ends)), found, rule, "until_tokens in ascending order")
        name, size = self.step_sizes[0]
        found = f"train.tokens = {self.tokens}, {name} = {size}"
        require(self.steps > 0, found, "there must be at least one step", f"train.tokens={size} or more")

    @property
    def steps(self) -> int:
        """Optimizer steps in all; tokens that do not fill a last step are left out."""
        return self.steps_within(self.tokens)

    @property
    def seqs_per_step(self) -> int:
        """Sequences in one optimizer step over all devices, once a ramp is over."""
        return self.tokens_per_step // self.seq_len

    @property
    def step_sizes(self) -> list[tuple[str, int]]:
        """Setting and tokens of each size that a step has, in the order of the run."""
        ramp = [(f"train.batch_ramp.{k}.tokens_per_step", s.tokens_per_step) for k, s in enumerate(self.batch_ramp)]
        return [*ramp, ("train.tokens_per_step", self.tokens_per_step)]

    def first_sample(self, step: int) -> int:
        """Samples, of `seq_len` tokens, that the steps before `step` take: all that turns steps into positions."""
        begin, sample, seqs = [stage for stage in self._stages() if stage[0] <= step][-1]
        return sample + (step - begin) * seqs

    def steps_within(self, tokens: int) -> int:
        """Whole steps that so many tokens make."""
        samples = tokens // self.seq_len
        begin, sample, seqs = [stage for stage in self._stages() if stage[1] <= samples][-1]
        return begin + (samples - sample) // seqs

    def _stages(self) -> Iterator[tuple[int, int, int]]:
        """First step, first sample, and sequences a step: of each stage of the ramp, and of what follows."""
        step = sample = 0
        ends = [*(stage.until_tokens for stage in self.batch_ramp), 0]
        for end, (_, size) in zip(ends, self.step_sizes, strict=True):
            yield step, sample, size // self.seq_len
            n_steps = max(0, -(-(end - sample * self.seq_len) // size))
            step, sample = step + n_steps, sample + n_steps * (size // self.seq_len)


@dataclass
class FaultConfig(Section, prefix="faults"):
    """What the loop does about bad numbers."""

    max_skipped_in_a_row: NaturalInt = 5
    """Steps with a gradient that is not finite are left out; after more than so many in a row the run stops."""
    spike_window_steps: NaturalInt = 128
    """A loss is compared with so many before it, once half of them are there; 0: spikes are not looked for."""
    spike_sigmas: PositiveFloat = 8.0
    """A spike is a loss so many robust deviations (1.4826 x MAD, 2 % of the median at least) above the median."""
    spike_skip_steps: PositiveInt = 2
    """After a spike, the run goes back to a checkpoint and leaves out the samples of so many steps, up to the spike."""
    max_rewinds: NaturalInt = 8
    """A run that has gone back so often stops at the next spike."""


@dataclass
class SuiteConfig(Section, prefix="suite"):
    """What every checkpoint is asked, besides bits per byte."""

    tasks: list[Family] = MISSING
    """Families of tasks, see eval/suites.py; none: bits per byte alone."""
    max_items_per_language: Annotated[int, Rule(lambda n: n >= 2, "a standard error takes two items", "2 or more")] = 50
    """Questions of one family in one language at most."""
    bootstrap_samples: PositiveInt = 1000
    """Resamplings of documents for the intervals of bits per byte."""
    batch_seqs: PositiveInt = 16
    """Sequences scored at a time on one device."""


@dataclass
class ReleaseConfig:
    """What the release folder says of itself."""

    licence: str = ""
    """Licence of the weights, as Hugging Face names it (apache-2.0); the card says GAP where this is empty."""
    provider: str = ""
    """Who publishes the model; the card says GAP where this is empty."""


@dataclass
class LogConfig:
    """Where metrics go besides `metrics.jsonl` and the terminal."""

    wandb: WandbMode = WandbMode.off
    """off, offline (files under RUN/logs, to be synced from a login node), or online."""
    wandb_project: str = "marathon"
    """Project at Weights & Biases."""


@dataclass
class ClusterConfig(Section, prefix="cluster"):
    """The machine."""

    name: str = MISSING
    """Name of this cluster."""
    device: Device = MISSING
    """cpu, cuda or rocm."""
    scratch: str = MISSING
    """Folder for runs and corpora; on a cluster the large shared file system."""
    nodes: PositiveInt = 1
    """Nodes of the job; the job scripts fill it in from Slurm."""
    devices_per_node: PositiveInt = MISSING
    """Processes a node, one a device."""
    cpus_per_device: PositiveInt = MISSING
    """Cores, and threads, of each process."""
    device_memory_gib: float = MISSING
    """Memory of one device, for `marathon plan`."""
    peak_tflops: float = MISSING
    """Dense peak of one device in 1e12 operations a second, the denominator of MFU; 0: measured at the start."""
    peak_source: str = MISSING
    """Where that number comes from."""
    peak_tflops_derived: float = 0.0
    """A second peak, reckoned where the vendor states none for this very device: metrics then have both MFUs."""
    pue: Annotated[float, Rule(lambda pue: pue == 0 or pue >= 1, "a facility draws no less than its nodes", "1.1")] = 0
    """Energy of the facility over that of its nodes; 0: not known."""
    pue_source: str = ""
    """Where that number comes from; without it the energy of the facility is a GAP."""
    online: bool = False
    """Whether hubs may be asked for data; off on compute nodes."""

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.devices_per_node


@dataclass
class RunConfig:
    """A run: everything that decides what it does."""

    name: str = MISSING
    """Name of the run; its folder is SCRATCH/runs/NAME."""
    seed: int = 1
    """Seeds initial weights and the order of samples."""
    profile: bool = False
    """Trace a few steps, and write where their time went into RUN/logs/profile."""
    rehearse: bool = False
    """Try out a recipe in minutes: the same code and layout with toy widths and the sample text, under the name
    NAME-rehearsal. What takes the place of what, and why, stands in configs/rehearsal.yaml."""
    corpus: CorpusConfig = MISSING
    """Text in."""
    tasks: TasksConfig = field(default_factory=TasksConfig)
    """Where the text is prepared."""
    tokenizer: TokenizerConfig = MISSING
    """Text to tokens."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """How often each language is seen."""
    model: ModelConfig = MISSING
    """The network."""
    optim: OptimConfig = MISSING
    """The optimizer."""
    schedule: ScheduleConfig = MISSING
    """Learning rate over steps."""
    engine: EngineConfig = MISSING
    """DeepSpeed."""
    train: TrainConfig = MISSING
    """How much is trained, in what portions."""
    faults: FaultConfig = field(default_factory=FaultConfig)
    """What is done about bad numbers."""
    suite: SuiteConfig = MISSING
    """What checkpoints are asked."""
    release: ReleaseConfig = field(default_factory=ReleaseConfig)
    """What the release says of itself."""
    log: LogConfig = field(default_factory=LogConfig)
    """Where metrics go."""
    cluster: ClusterConfig = MISSING
    """The machine."""
