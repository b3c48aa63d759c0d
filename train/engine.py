"""DeepSpeed, and nothing of it beyond this file.

The engine takes micro batches, accumulates and reduces gradients in fp32, steps the sharded optimizer, and gives access
to the shards as fragments: ranges of named parameters, which is what a checkpoint stores. Those of ZeRO 1 and 2 are
found by `_hp_mapping`, DeepSpeed's own link from a parameter to its part of the flat fp32 partition, which the
BF16_Optimizer behind ZeRO-1 in bf16 keeps too; those of ZeRO-3 by its table of partitions, `grad_position`.
"""

import io
import logging
import os
import re
import unittest.mock
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from configs.enums import Precision
from configs.errors import UserError
from configs.schema import EngineConfig, RunConfig
from model.decoder import Attention, Decoder
from model.loss import IGNORED, next_token_labels, summed_cross_entropy
from model.weights import MASTER, Columns, FragmentReader
from train.dist import Rank
from train.optim import MOMENTS, Matrix, Muon, build_optimizer, ready
from train.schedule import step_shape
from train.timer import StepTimer
from train.ulysses import Ulysses
from train.versions import known_bad

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed  # looks for the accelerator when it is imported

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Said of every optimizer that it does not know by name; ours are tested.
logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
# On a CPU, every rank would compile a C++ op at its start that only inference uses.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed imports its Muon whatever the optimizer is, and that compiles three functions: a second of each start.
with unittest.mock.patch("deepspeed.runtime.compiler.compile", lambda *_, **__: lambda function: function):
    import deepspeed.runtime.zero.muon.original_muon
# Said once a rank by PyTorch about calls of DeepSpeed's.
warnings.filterwarnings("ignore", message=".*_tensor. is deprecated", category=FutureWarning)

COLLECTIVES = (
    "all_reduce", "inference_all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor",
    "all_gather_coalesced", "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single",
)  # fmt: skip
"""Of DeepSpeed's backend: those that a step may use."""

OUTPUTS_SHARED, INPUTS_SHARED = r".*\.(q|k|v|gate|up)_proj\.weight$", r".*\.(o|down)_proj\.weight$"
"""Matrices of which each device of a tensor-parallel group has some rows, and of which some columns."""


class OwnedFragment(NamedTuple):
    """A range of a parameter, or of some columns of it (model/weights.py: `Columns`), by name and first index.

    With views of what this rank holds of it, 1-D fp32: master, and moments, of which the first, exp_avg, is an average
    of gradients that decays by beta1.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]
    beta1: float


class NextTokenLoss(nn.Module):
    """What the engine differentiates: the decoder with its loss."""

    def __init__(self, decoder: Decoder, n_parts: int = 1, part: int = 0, z_loss: float = 0.0) -> None:
        """Of each sequence it takes the positions of one of `n_parts` equal parts."""
        super().__init__()
        self.decoder, self.n_parts, self.part, self.z_loss = decoder, n_parts, part, z_loss

    def forward(self, tokens_BT1: Tensor, doc_BT1: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        """Loss to differentiate, and sum of nats with the number of labels, [2]; without documents, logits.

        The loss is the sum over B x T positions divided by B x T, not by the number of labels. So a step's
        gradient does not depend on how its sequences were shared out over devices and micro batches.
        """
        if doc_BT1 is None:
            # Through this module and not around it: ZeRO-3 gathers weights where it sees a forward pass begin.
            return cast(Tensor, self.decoder(tokens_BT1))
        labels_BT = next_token_labels(tokens_BT1, doc_BT1)
        n = labels_BT.shape[1] // self.n_parts
        mine = slice(self.part * n, (self.part + 1) * n)
        labels_BT = labels_BT[:, mine]
        hidden_BTD = self.decoder.hidden(tokens_BT1[:, :-1], doc_BT1[:, :-1], mine)
        loss, nats = summed_cross_entropy(hidden_BTD, self.decoder.output_weight, labels_BT, self.z_loss)
        return loss / labels_BT.numel(), torch.stack((nats, (labels_BT != IGNORED).sum()))


class Engine:
    """Trains a decoder over all ranks, from its weights, which every rank gives alike, or from a checkpoint."""

    def __init__(self, decoder: Decoder, cfg: RunConfig, rank: Rank) -> None:
        self.rank, self.zero_stage, self.decoder = rank, cfg.engine.zero_stage, decoder.to(rank.device)
        # Taken now: under ZeRO-3 a parameter has no shape while it is sharded.
        self.shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
        self.version: str = deepspeed.__version__
        refuse_known_bad(self.version, torch.__version__, cfg.engine)
        self.tensor_parallel, n_parts = cfg.engine.tensor_parallel, cfg.engine.sequence_parallel
        if n_parts > 1:
            ulysses = Ulysses(n_parts)
            for attention in decoder.modules():
                if isinstance(attention, Attention):
                    attention.attend = ulysses  # type: ignore[assignment]
        if cfg.engine.compile:
            for block in decoder.blocks:
                # A graph for each shape: kernels for any shape would be others, depending on which came first.
                block.compile(dynamic=False)
        optimizer = build_optimizer(self.decoder, cfg)
        with redirect_stdout(io.StringIO()):  # in bf16 it prints its memory, in fifteen lines
            self.engine, *_ = deepspeed.initialize(
                model=NextTokenLoss(self.decoder, n_parts, rank.rank % n_parts, cfg.train.z_loss),
                optimizer=optimizer,
                config=deepspeed_config(cfg),
                dist_init_required=False,
            )
        if isinstance(optimizer, Muon):
            self._place_matrices(optimizer)
        self.timer = StepTimer(rank.device)
        backend = deepspeed.comm.comm.cdb
        for name in COLLECTIVES:
            call = getattr(backend, name)
            setattr(backend, name, partial(self.timer.collective, *getattr(call, "args", (call,))))

    def begin_step(self, n_micro_batches: int) -> None:
        """The step that begins takes so many micro batches on each device: by their number their losses are divided."""
        each = self.engine.train_micro_batch_size_per_gpu() * self.engine.dp_world_size
        self.engine.set_train_batch_size(n_micro_batches * each)
        # DeepSpeed counts on over all steps, and takes multiples of the number for their ends: after 3, the 1st of 4.
        self.engine.micro_steps = 0

    def backward(self, tokens_BT1: Tensor, doc_BT1: Tensor) -> Tensor:
        """Adds a micro batch to the step's gradient; returns summed nats and number of labels, [2]."""
        device = self.rank.device
        with self.timer.part("forward"):
            loss, counts = self.engine(tokens_BT1.to(device, non_blocking=True), doc_BT1.to(device, non_blocking=True))
        with self.timer.part("backward"):
            self.engine.backward(loss)
            if not self.engine.is_gradient_accumulation_boundary():
                self.engine.step()
        # What ranks compute together counts once.
        return cast(Tensor, counts) * (self.rank.rank % self.tensor_parallel == 0)

    def step(self, lr: float) -> tuple[float, bool]:
        """Ends the accumulation: clips, steps, clears.

        Returns the gradient's norm before clipping, and whether it was applied: one that is not finite is left out by
        all ranks alike, and weights and moments stay as they were.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        with self.timer.part("optimizer"):
            self.engine.step()
            return float(self.engine.get_global_grad_norm()), self.engine.was_step_applied()

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] in evaluation mode; under ZeRO-3 all ranks have to call it equally often."""
        self.engine.eval()
        # Lengths differ from batch to batch; a graph for each is not worth compiling.
        with torch.compiler.set_stance("force_eager"):
            found = cast(Tensor, self.engine(tokens_BT))
        self.engine.train()
        return found

    def fragments(self) -> Iterator[OwnedFragment]:
        """This rank's part of weights and moments; over all ranks they make the whole, without overlap."""
        has_all = self.rank.rank % self.tensor_parallel == 0
        for name, start, group, where in self._places():
            if has_all or re.match(f"{OUTPUTS_SHARED}|{INPUTS_SHARED}", name.partition("@")[0]):
                state, betas = self._state(group)
                tensors = {kind: tensor[where] for kind, tensor in state.items() if kind in (MASTER, *MOMENTS)}
                yield OwnedFragment(name, start, tensors, betas[0])

    def fill(self, reader: FragmentReader, updates: int) -> None:
        """Takes what this rank holds of weights and moments from a checkpoint, whatever world size or stage wrote it.

        `updates` is the number of steps that the moments have seen; with 0 they begin anew.
        """
        for name, start, group, where in self._places():
            state, betas = self._state(group)
            state["step"].fill_(float(updates))
            state[MASTER][where] = reader.read(MASTER, name, start, where.stop - where.start)
            for kind in MOMENTS[: len(betas)]:
                state[kind][where] = reader.read(kind, name, start, where.stop - where.start) if updates else 0.0
        zero = self.engine.optimizer
        if self.zero_stage < 3:
            zero.update_lp_params()
            return
        zero.checkpoint_event_prologue()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()

    def _places(self) -> Iterator[tuple[str, int, int, slice]]:
        """Name, first index, number of the flat partition and place in it, of each parameter this rank has part of."""
        zero = self.engine.optimizer
        for name, parameter in zip(self.shapes, self.decoder.parameters(), strict=True):
            if self.zero_stage == 3:
                group, offset, share = zero.grad_position[zero.get_param_id(parameter)]
                start = share * (self.rank.rank // self.tensor_parallel)
                # The last parts are padded, or padding alone.
                numel = min(share, parameter.ds_numel - start)  # type: ignore[attr-defined]
                if numel > 0:
                    yield *self._within(name, start), group, slice(offset, offset + numel)
            elif (link := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                inside = link.hp_fragment_address
                where = slice(inside.start, inside.start + inside.numel)
                yield *self._within(name, link.lp_fragment_address.start), link.param_group_index, where

    def _within(self, name: str, start: int) -> tuple[str, int]:
        """Name and first index in the whole parameter, from the index in what AutoTP has left of it here."""
        n_parts, part = self.tensor_parallel, self.rank.rank % self.tensor_parallel
        if n_parts > 1 and re.match(OUTPUTS_SHARED, name):
            return name, start + part * self.shapes[name].numel() // n_parts
        if n_parts > 1 and re.match(INPUTS_SHARED, name):
            columns = self.shapes[name][1]
            width = columns // n_parts
            return str(Columns(name, part * width, (part + 1) * width, columns)), start
        return name, start

    def _flat(self, group: int) -> tuple[Tensor, tuple[float, ...]]:
        """A flat partition, and the betas of the parameters in it."""
        zero, groups = self.engine.optimizer, self.engine.optimizer.optimizer.param_groups
        if self.zero_stage == 3:
            return zero.fp32_partitioned_groups_flat[group], groups[zero.sub_group_to_group_id[group]]["betas"]
        return groups[group]["params"][0], groups[group]["betas"]

    def _state(self, group: int) -> tuple[dict[str, Tensor], tuple[float, ...]]:
        """Weights and moments of a flat partition, and its betas; PyTorch makes the moments only in the first step."""
        flat, betas = self._flat(group)
        return {MASTER: flat.data, **ready(self.engine.optimizer.optimizer.state[flat], flat, betas)}, betas

    def _place_matrices(self, muon: Muon) -> None:
        mine = {name: (group, where) for name, _, group, where in self._places()}
        by_rank = self.rank.gather({name: (group, where.stop - where.start) for name, (group, where) in mine.items()})
        muon.matrices = {}
        for turn, (name, shape) in enumerate(self.shapes.items()):
            groups, numels = zip(*(there.get(name, (0, 0)) for there in by_rank), strict=True)
            flat, betas = self._flat(max(groups))
            if len(betas) == 1:
                owner = max(range(len(numels)), key=lambda rank: (numels[rank], (rank + turn) % len(numels)))
                matrix = Matrix(shape, mine.get(name, (0, slice(0)))[1], list(numels), owner)
                muon.matrices.setdefault(flat, []).append(matrix)


def deepspeed_config(cfg: RunConfig) -> dict[str, Any]:
    """Our settings in DeepSpeed's words; what is not settable here is fixed for a reason.

    `grad_accum_dtype` fp32 with `communication_data_type` fp32: DeepSpeed's default is the model's dtype for both,
    which in bf16 loses small gradients; with the pair, the stages differ in the order of sums alone.
    """
    shape, engine = step_shape(cfg), cfg.engine
    tensor_parallel = {
        "autotp_size": engine.tensor_parallel,
        "partition_config": {
            "use_default_specs": False,
            "layer_specs": [
                {"patterns": [OUTPUTS_SHARED], "partition_type": "column"},
                {"patterns": [INPUTS_SHARED], "partition_type": "row"},
                # Each device norms its own heads: what their weight gets from all of them is added up.
                {"patterns": [r".*\.[qk]_norm\.weight$"], "partition_type": "skip", "grad_allreduce": True},
            ],
        },
    }
    return {
        # Sequences over all devices are not told: where devices share sequences, DeepSpeed would count them twice.
        "train_micro_batch_size_per_gpu": shape.micro_batch_seqs,
        "gradient_accumulation_steps": shape.accumulation_steps,
        "gradient_clipping": cfg.optim.grad_clip,
        # In fp32 and with ZeRO-3 a gradient that is not finite is always left out; in bf16 it has to be asked for.
        "bf16": {"enabled": engine.precision is Precision.bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": engine.comm_precision.value,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": engine.bucket_elements,
            "allgather_bucket_size": engine.bucket_elements,
            # Reduces while the backward pass goes on; without effect, and refused, on a CPU.
            "overlap_comm": torch.cuda.is_available(),
            "zero_hpz_partition_size": max(engine.shard_group, 1),
        },
        "steps_per_print": 2**31,
        **({"tensor_parallel": tensor_parallel} if engine.tensor_parallel > 1 else {}),
    }


def refuse_known_bad(deepspeed: str, pytorch: str, cfg: EngineConfig) -> None:
    """Raises `UserError` for versions that compute something else than they should with these settings."""
    layout = f"ZeRO-{cfg.zero_stage} in {cfg.precision.value}"
    if harm := known_bad(deepspeed, pytorch, layout):
        repair = "a container or environment with DeepSpeed 0.19.5 or later: slurm/build_env.sh"
        raise UserError(f"DeepSpeed {deepspeed} with torch {pytorch}, {layout}", harm, repair)
