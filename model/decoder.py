"""The whole network, top to bottom: a decoder of the Llama family with QK-norm, exported as Qwen3ForCausalLM.

Beneath it stand its first weights and its size; its loss is model/loss.py.

Shape suffixes: B sequences, T positions, D width of the residual stream, N query heads, K key/value heads,
H width of a head, F inner width of the MLP, V rows of the vocabulary.

What keeps the export exact: pre-norm, plain RMSNorm weights, rotate-half RoPE over whole heads, RMSNorm on
each head of queries and keys before RoPE, no biases, no multipliers, no soft-caps.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from configs.enums import Recompute
from configs.schema import ModelConfig
from model.attention import attend, document_ends
from model.linear import Linear


class RMSNorm(nn.Module):
    """Divides by the root of the mean square over the last dimension, in fp32, then scales."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with `width` last; keeps shape and dtype."""
        x_fp32 = x.float()
        scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x_fp32 * scale).to(x.dtype)


def rotary_tables(seq_len: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and frequency, each [seq_len, 1, head_dim], in fp32."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle_TH = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), frequency).repeat(1, 2)
    return angle_TH.cos()[:, None], angle_TH.sin()[:, None]


def rotate(x_BTNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Turns each pair (h, h + H/2) of dimensions by the angle of its position."""
    first, second = x_BTNH.chunk(2, dim=-1)
    turned = x_BTNH * cos_T1H + torch.cat((-second, first), dim=-1) * sin_T1H
    return turned.to(x_BTNH.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries and normed queries and keys."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.attend = cfg.head_dim, attend
        self.q_proj = Linear(cfg.d_model, cfg.n_head * cfg.head_dim)
        self.k_proj = Linear(cfg.d_model, cfg.n_kv_head * cfg.head_dim)
        self.v_proj = Linear(cfg.d_model, cfg.n_kv_head * cfg.head_dim)
        self.o_proj = Linear(cfg.n_head * cfg.head_dim, cfg.d_model)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)

    def forward(self, x_BTD: Tensor, cos_T1H: Tensor, sin_T1H: Tensor, ends: Tensor | None) -> Tensor:
        """[B, T, D] to [B, T, D]; without ends of documents, all earlier positions are seen."""
        q_BTNH = rotate(self.q_norm(self._heads(self.q_proj(x_BTD))), cos_T1H, sin_T1H)
        k_BTKH = rotate(self.k_norm(self._heads(self.k_proj(x_BTD))), cos_T1H, sin_T1H)
        out_BTNH = self.attend(q_BTNH, k_BTKH, self._heads(self.v_proj(x_BTD)), ends)
        out: Tensor = self.o_proj(out_BTNH.flatten(2))
        return out

    def _heads(self, x_BTM: Tensor) -> Tensor:
        return x_BTM.view(*x_BTM.shape[:-1], -1, self.head_dim)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(cfg.d_model, cfg.d_ff)
        self.up_proj = Linear(cfg.d_model, cfg.d_ff)
        self.down_proj = Linear(cfg.d_ff, cfg.d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out


WHOLE = slice(None)  # all positions of a sequence
KEPT = {
    Recompute.selective: [
        torch.ops.aten.mm.default,
        torch.ops.marathon.product.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.marathon.one_by_one.default,
        torch.ops.torch_attn._varlen_attn.default,
    ],
    Recompute.full: [],
}
"""Operations whose results are kept; the others of a block are computed again."""


class Block(nn.Module):
    """Attention and MLP, each on a normed copy of the residual stream."""

    def __init__(self, cfg: ModelConfig, recompute: Recompute) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attention = Attention(cfg)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x_BTD: Tensor, cos_T1H: Tensor, sin_T1H: Tensor, ends: Tensor | None) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        if self.recompute is Recompute.none or not torch.is_grad_enabled():
            return self._compute(x_BTD, cos_T1H, sin_T1H, ends)
        out: Tensor = checkpoint(
            self._compute,
            *(x_BTD, cos_T1H, sin_T1H, ends),
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn
            context_fn=partial(create_selective_checkpoint_contexts, KEPT[self.recompute]),
        )
        return out

    def _compute(self, x_BTD: Tensor, cos_T1H: Tensor, sin_T1H: Tensor, ends: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_T1H, sin_T1H, ends)
        out: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return out


class Decoder(nn.Module):
    """Tokens to logits; the `vocab_rows` of the embedding are the vocabulary, padded (`padded_rows`)."""

    def __init__(self, cfg: ModelConfig, vocab_rows: int, recompute: Recompute = Recompute.none) -> None:
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(vocab_rows, cfg.d_model, _weight=torch.empty(vocab_rows, cfg.d_model))
        self.blocks = nn.ModuleList(Block(cfg, recompute) for _ in range(cfg.n_layer))
        self.final_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.output = None if cfg.tie_embeddings else Linear(cfg.d_model, vocab_rows)

    @property
    def output_weight(self) -> Tensor:
        """[V, D]: what turns the last hidden states into logits."""
        return self.embedding.weight if self.output is None else self.output.weight

    def hidden(self, tokens_BT: Tensor, doc_BT: Tensor | None = None, part: slice = WHOLE) -> Tensor:
        """Last hidden states [B, T, D], normed; attention stays inside the documents that `doc_BT` numbers.

        Only a `part` of the positions, where `Attention.attend` brings together what other devices have of the others.
        """
        cos_T1H, sin_T1H = rotary_tables(tokens_BT.shape[1], self.cfg.head_dim, self.cfg.rope_theta, tokens_BT.device)
        ends = None if doc_BT is None else document_ends(doc_BT)
        x_BTD = self.embedding(tokens_BT[:, part])
        cos_T1H, sin_T1H = cos_T1H[part].to(x_BTD.dtype), sin_T1H[part].to(x_BTD.dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_T1H, sin_T1H, ends)
        out: Tensor = self.final_norm(x_BTD)
        return out

    def forward(self, tokens_BT: Tensor, doc_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]."""
        return F.linear(self.hidden(tokens_BT, doc_BT), self.output_weight)

    @torch.no_grad()
    def generate_greedily(self, tokens_T: Tensor, n_tokens: int) -> Tensor:
        """Appends the likeliest token `n_tokens` times, without a cache: for checks, not for serving."""
        for _ in range(n_tokens):
            tokens_T = torch.cat((tokens_T, self(tokens_T[None])[0, -1].argmax()[None]))
        return tokens_T


@torch.no_grad()
def init_weights(decoder: Decoder, seed: int) -> None:
    """Fills every parameter, always alike for a seed.

    Normal with `init_std`, cut at three deviations; layers that write to the residual stream are divided by
    sqrt(2 n_layer), so that its variance does not grow with depth (GPT-2, section 2.3). All times `width_factors`.
    """
    generator, std = torch.Generator().manual_seed(seed), decoder.cfg.init_std
    for name, parameter in decoder.named_parameters():
        factor, _ = width_factors(decoder.cfg, name)
        if name.endswith("norm.weight"):
            parameter.fill_(factor)
        else:
            to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            deviation = factor * (std / math.sqrt(2 * decoder.cfg.n_layer) if to_residual else std)
            # Drawn in fp32 on the CPU, whatever the parameter is: the same model on every device and precision.
            values = torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator)
            parameter.copy_(values.clamp_(-3 * deviation, 3 * deviation))


def width_factors(cfg: ModelConfig, name: str) -> tuple[float, float]:
    """What a parameter's initial values and Adam's learning rate are multiplied with to serve any width (muP).

    Yang et al. 2022 (arXiv 2203.03466), table 3, the form without multipliers, which an export has no place for. Tied
    embeddings stay as an input's, and the last norm's weight takes the factor of an output. Attention takes none: heads
    keep their width. A parameter that no rule names is an error: values left from allocation would train, badly.
    """
    m = cfg.d_model / cfg.mup_base_width if cfg.mup_base_width else 1.0
    if name.endswith("_proj.weight"):
        return 1 / math.sqrt(m), 1 / m
    if name == "output.weight" or (name == "final_norm.weight" and cfg.tie_embeddings):
        return 1 / m, 1 / m
    if name.endswith(("norm.weight", "embedding.weight")):
        return 1.0, 1.0
    raise AssertionError(f"no rule initialises {name}")


def padded_rows(vocab_size: int) -> int:
    """Rows of the embedding: a multiple of 128, which matrix units like and tensor parallelism can split."""
    return -(-vocab_size // 128) * 128


def count_parameters(cfg: ModelConfig, vocab_rows: int) -> int:
    """All parameters; an embedding matrix that serves twice is counted once."""
    norms = cfg.n_layer * 2 * (cfg.head_dim + cfg.d_model) + cfg.d_model
    return _in_matrices(cfg) + norms + vocab_rows * cfg.d_model * (1 if cfg.tie_embeddings else 2)


def flops_per_token(cfg: ModelConfig, vocab_rows: int, seq_len: int) -> float:
    """Operations of forward and backward for one trained token; recomputation is not counted.

    6 for each parameter that multiplies (2 forward, 4 backward; the input embedding is a look-up, the output matrix
    multiplies even where it is tied), and 6 n_layer n_head head_dim seq_len for attention: two products of 2 operations
    a position, 3 passes, over the half of the positions that a causal mask leaves. Document masks leave fewer; they are
    not deducted. This is Chowdhery et al. 2022 (PaLM), appendix B, with the causal half.
    """
    attention = 6 * cfg.n_layer * cfg.n_head * cfg.head_dim * seq_len
    return 6.0 * (_in_matrices(cfg) + vocab_rows * cfg.d_model) + attention


def _in_matrices(cfg: ModelConfig) -> int:
    """Parameters in the matrices of all blocks."""
    return cfg.n_layer * cfg.d_model * (2 * cfg.head_dim * (cfg.n_head + cfg.n_kv_head) + 3 * cfg.d_ff)
