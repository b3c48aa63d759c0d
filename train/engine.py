"""DeepSpeed, and nothing of it beyond this file.

The engine takes micro batches, accumulates and reduces gradients in fp32, steps the sharded optimizer, and
gives access to the shards as fragments: ranges of named parameters, which is what a checkpoint stores.
Fragments go through `_hp_mapping`, DeepSpeed's own link from a parameter to its part of the flat fp32
partition; ZeRO-1 in fp32, ZeRO-2, and the BF16_Optimizer that stands behind ZeRO-1 in bf16 all keep it.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.enums import Precision
from configs.schema import EngineConfig, OptimConfig
from model.decoder import Decoder
from model.loss import IGNORED, next_token_labels, summed_cross_entropy
from model.weights import MASTER, FragmentReader
from train.batch import StepShape
from train.dist import Rank
from train.optim import adamw

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed  # looks for the accelerator when it is imported

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# On a CPU, every rank would compile a C++ op at its start that only inference uses.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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

    def forward(self, tokens_BT1: Tensor, doc_BT1: Tensor) -> tuple[Tensor, Tensor]:
        """Loss to differentiate, and sum of nats with the number of labels, [2].

        The loss is the sum over B x T positions divided by B x T, not by the number of labels. So a step's
        gradient does not depend on how its sequences were shared out over devices and micro batches.
        """
        labels_BT = next_token_labels(tokens_BT1, doc_BT1)
        hidden_BTD = self.decoder.hidden(tokens_BT1[:, :-1], doc_BT1[:, :-1])
        nats = summed_cross_entropy(hidden_BTD, self.decoder.output_weight, labels_BT)
        counts = torch.stack((nats.detach(), (labels_BT != IGNORED).sum()))
        return nats / labels_BT.numel(), counts


class Engine:
    """Trains a decoder over all ranks. Weights have to be in place before; every rank gives the same ones."""

    def __init__(
        self, decoder: Decoder, engine: EngineConfig, optim: OptimConfig, shape: StepShape, rank: Rank
    ) -> None:
        self.decoder = decoder.to(rank.device)
        with contextlib.redirect_stdout(io.StringIO()):  # in bf16 it prints its memory, in fifteen lines
            self.engine, *_ = deepspeed.initialize(
                model=NextTokenLoss(self.decoder),
                optimizer=adamw(self.decoder, optim),
                config=deepspeed_config(engine, optim, shape, rank.world_size),
                dist_init_required=False,
            )
        self.rank = rank

    def backward(self, tokens_BT1: Tensor, doc_BT1: Tensor) -> Tensor:
        """Adds a micro batch to the step's gradient; returns summed nats and number of labels, [2]."""
        device = self.rank.device
        loss, counts = self.engine(tokens_BT1.to(device, non_blocking=True), doc_BT1.to(device, non_blocking=True))
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
        result: Tensor = counts
        return result

    def step(self, lr: float) -> float:
        """Ends the accumulation: clips, steps, clears; returns the gradient's norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def fragments(self) -> Iterator[OwnedFragment]:
        """This rank's part of weights and moments; over all ranks they make the whole, without overlap."""
        inner = self.engine.optimizer.optimizer
        for name, parameter in self.decoder.named_parameters():
            if (link := getattr(parameter, FRAGMENT_LINK)) is None:
                continue
            flat = inner.param_groups[link.param_group_index]["params"][0]
            where = slice(
                link.hp_fragment_address.start, link.hp_fragment_address.start + link.hp_fragment_address.numel
            )
            state = self._state(inner, flat)
            tensors = {MASTER: flat.data[where], **{kind: state[kind][where] for kind in MOMENTS}}
            yield OwnedFragment(name, link.lp_fragment_address.start, tensors)

    def restore(self, reader: FragmentReader, step: int) -> None:
        """Fills weights in fp32 and moments from a checkpoint, whatever world size or stage wrote it."""
        for fragment in self.fragments():
            for kind, tensor in fragment.tensors.items():
                tensor.copy_(reader.read(kind, fragment.name, fragment.start, tensor.numel()))
        inner = self.engine.optimizer.optimizer
        for group in inner.param_groups:
            self._state(inner, group["params"][0])["step"].fill_(float(step))

    @staticmethod
    def _state(inner: torch.optim.Optimizer, flat: Tensor) -> dict[str, Any]:
        """State of a flat partition; AdamW makes its own only in the first step."""
        state: dict[str, Any] = inner.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state.update({kind: torch.zeros_like(flat) for kind in MOMENTS})
        return state


def deepspeed_config(engine: EngineConfig, optim: OptimConfig, shape: StepShape, world_size: int) -> dict[str, Any]:
    """Our settings in DeepSpeed's words; what is not settable here is fixed for a reason.

    `grad_accum_dtype` fp32 with `communication_data_type` fp32: DeepSpeed's default is the model's dtype for
    both, which in bf16 loses small gradients; with the pair, ZeRO 1 and 2 agree bit by bit.
    """
    return {
        "train_batch_size": shape.seqs_per_step,
        "train_micro_batch_size_per_gpu": shape.micro_batch_seqs,
        "gradient_accumulation_steps": shape.accumulation_steps,
        "gradient_clipping": optim.grad_clip,
        "bf16": {"enabled": engine.precision is Precision.bf16},
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
