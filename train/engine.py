"""DeepSpeed, and nothing of it beyond this file.

The engine takes micro batches, accumulates and reduces gradients in fp32, steps the sharded optimizer, and
gives access to the shards as fragments: ranges of named parameters, which is what a checkpoint stores.
Fragments of ZeRO 1 and 2 go through `_hp_mapping`, DeepSpeed's own link from a parameter to its part of the flat
fp32 partition, which the BF16_Optimizer behind ZeRO-1 in bf16 keeps too; those of ZeRO-3 through the places where
it keeps each parameter's partition, `grad_position`.
"""

import contextlib
import io
import logging
import os
import unittest.mock
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.enums import Precision
from configs.schema import EngineConfig, OptimConfig
from model.decoder import IGNORED, Decoder, next_token_labels, summed_cross_entropy
from model.weights import MASTER, FragmentReader
from train.batch import StepShape
from train.dist import Rank, Stopwatch
from train.optim import adamw
from train.versions import refuse_known_bad

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed  # looks for the accelerator when it is imported

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# On a CPU, every rank would compile a C++ op at its start that only inference uses.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed imports its Muon whatever the optimizer is, and that compiles three functions: a second of each start.
with unittest.mock.patch("deepspeed.runtime.compiler.compile", lambda *_, **__: lambda function: function):
    import deepspeed.runtime.zero.muon.original_muon
# Said once a rank by PyTorch about a call of DeepSpeed's.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated", category=FutureWarning)

MOMENTS = ("exp_avg", "exp_avg_sq")
FRAGMENT_LINK = "_hp_mapping"


@dataclass(frozen=True)
class OwnedFragment:
    """A range of a parameter whose fp32 weights and moments this rank holds; views, not copies."""

    name: str
    start: int
    tensors: dict[str, Tensor]
    """By kind: master, exp_avg, exp_avg_sq; each 1-D fp32 of the same length."""


class NextTokenLoss(nn.Module):
    """What the engine differentiates: the decoder with its loss."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens_BT1: Tensor, doc_BT1: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        """Loss to differentiate, and sum of nats with the number of labels, [2]; without documents, logits.

        The loss is the sum over B x T positions divided by B x T, not by the number of labels. So a step's
        gradient does not depend on how its sequences were shared out over devices and micro batches.
        """
        if doc_BT1 is None:
            # Through this module and not around it: ZeRO-3 gathers weights where it sees a forward pass begin.
            logits: Tensor = self.decoder(tokens_BT1)
            return logits
        labels_BT = next_token_labels(tokens_BT1, doc_BT1)
        hidden_BTD = self.decoder.hidden(tokens_BT1[:, :-1], doc_BT1[:, :-1])
        nats = summed_cross_entropy(hidden_BTD, self.decoder.output_weight, labels_BT)
        counts = torch.stack((nats.detach(), (labels_BT != IGNORED).sum()))
        return nats / labels_BT.numel(), counts


class Engine:
    """Trains a decoder over all ranks, from its weights, which every rank gives alike, or from a checkpoint."""

    def __init__(
        self, decoder: Decoder, engine: EngineConfig, optim: OptimConfig, shape: StepShape, rank: Rank
    ) -> None:
        self.decoder = decoder.to(rank.device)
        # Taken now: under ZeRO-3 a parameter has no shape while it is sharded.
        self.shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
        self.version: str = deepspeed.__version__
        refuse_known_bad(self.version, torch.__version__, engine)
        if engine.compile:
            for block in decoder.blocks:
                # A graph for each shape: kernels for any shape would be others, depending on which came first.
                block.compile(dynamic=False)
        with contextlib.redirect_stdout(io.StringIO()):  # in bf16 it prints its memory, in fifteen lines
            self.engine, *_ = deepspeed.initialize(
                model=NextTokenLoss(self.decoder),
                optimizer=adamw(self.decoder, optim),
                config=deepspeed_config(engine, optim, shape, rank.world_size),
                dist_init_required=False,
            )
        self.rank = rank
        self.zero_stage = engine.zero_stage
        self.forward_time = Stopwatch(rank.device)
        """Of this rank's own forward passes: what tells a slow device from one that waits for it."""

    def backward(self, tokens_BT1: Tensor, doc_BT1: Tensor) -> Tensor:
        """Adds a micro batch to the step's gradient; returns summed nats and number of labels, [2]."""
        device = self.rank.device
        with self.forward_time:
            loss, counts = self.engine(tokens_BT1.to(device, non_blocking=True), doc_BT1.to(device, non_blocking=True))
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
        result: Tensor = counts
        return result

    def step(self, lr: float) -> tuple[float, bool]:
        """Ends the accumulation: clips, steps, clears.

        Returns the gradient's norm before clipping, and whether it was applied: one that is not finite is left
        out by all ranks alike, and weights and moments stay as they were.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm()), self.engine.was_step_applied()

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] in evaluation mode; under ZeRO-3 all ranks have to call it equally often."""
        self.engine.eval()
        # Lengths differ from batch to batch; a graph for each is not worth compiling.
        with torch.compiler.set_stance("force_eager"):
            found: Tensor = self.engine(tokens_BT)
        self.engine.train()
        return found

    def fragments(self) -> Iterator[OwnedFragment]:
        """This rank's part of weights and moments; over all ranks they make the whole, without overlap."""
        for name, start, flat, where in self._places():
            state = self._state(flat)
            yield OwnedFragment(
                name, start, {MASTER: flat.data[where], **{kind: state[kind][where] for kind in MOMENTS}}
            )

    def fill(self, reader: FragmentReader, updates: int) -> None:
        """Takes weights and moments from a checkpoint, whatever world size or stage wrote it.

        Each rank reads what it holds. `updates` is the number of steps that the moments have seen; with 0 they
        begin anew.
        """
        for fragment in self.fragments():
            for kind, tensor in fragment.tensors.items():
                if kind == MASTER or updates:
                    tensor.copy_(reader.read(kind, fragment.name, fragment.start, tensor.numel()))
                else:
                    tensor.zero_()
        for flat in {id(flat): flat for _, _, flat, _ in self._places()}.values():
            self._state(flat)["step"].fill_(float(updates))
        zero = self.engine.optimizer
        if self.zero_stage < 3:
            zero.update_lp_params()
            return
        zero.checkpoint_event_prologue()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()

    def _places(self) -> Iterator[tuple[str, int, Tensor, slice]]:
        """Name, first index, flat partition and place in it, of each parameter that this rank has a part of."""
        zero = self.engine.optimizer
        for name, parameter in zip(self.shapes, self.decoder.parameters(), strict=True):
            if self.zero_stage == 3:
                group, offset, share = zero.grad_position[zero.get_param_id(parameter)]
                start = share * self.rank.rank
                numel = min(share, self.shapes[name].numel() - start)  # the last parts are padded, or padding alone
                if numel > 0:
                    yield name, start, zero.fp32_partitioned_groups_flat[group], slice(offset, offset + numel)
            elif (link := getattr(parameter, FRAGMENT_LINK)) is not None:
                flat = zero.optimizer.param_groups[link.param_group_index]["params"][0]
                inside = link.hp_fragment_address
                yield name, link.lp_fragment_address.start, flat, slice(inside.start, inside.start + inside.numel)

    def _state(self, flat: Tensor) -> dict[str, Any]:
        """State of a flat partition; AdamW makes its own only in the first step."""
        state: dict[str, Any] = self.engine.optimizer.optimizer.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state.update({kind: torch.zeros_like(flat) for kind in MOMENTS})
        return state


def deepspeed_config(engine: EngineConfig, optim: OptimConfig, shape: StepShape, world_size: int) -> dict[str, Any]:
    """Our settings in DeepSpeed's words; what is not settable here is fixed for a reason.

    `grad_accum_dtype` fp32 with `communication_data_type` fp32: DeepSpeed's default is the model's dtype for
    both, which in bf16 loses small gradients; with the pair, the stages differ in
    the order of sums alone.
    """
    return {
        "train_batch_size": shape.seqs_per_step,
        "train_micro_batch_size_per_gpu": shape.micro_batch_seqs,
        "gradient_accumulation_steps": shape.accumulation_steps,
        "gradient_clipping": optim.grad_clip,
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
        },
        "steps_per_print": 2**31,
    }
