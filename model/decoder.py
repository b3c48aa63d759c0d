"""The whole network, top to bottom: a decoder of the Llama family with QK-norm, exported as Qwen3ForCausalLM.

Shape suffixes: B sequences, T positions, D width of the residual stream, N query heads, K key/value heads,
H width of a head, F inner width of the MLP, V rows of the vocabulary.

What keeps the export exact: pre-norm, plain RMSNorm weights, rotate-half RoPE over whole heads, RMSNorm on
each head of queries and keys before RoPE, no biases, no multipliers, no soft-caps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig


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
    """Cosine and sine of every position and frequency, each [seq_len, head_dim], in fp32."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle_TH = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), frequency).repeat(1, 2)
    return angle_TH.cos(), angle_TH.sin()


def rotate(x_BNTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Turns each pair (h, h + H/2) of dimensions by the angle of its position."""
    first, second = x_BNTH.chunk(2, dim=-1)
    turned = x_BNTH * cos_TH + torch.cat((-second, first), dim=-1) * sin_TH
    return turned.to(x_BNTH.dtype)


def document_mask(doc_BT: Tensor) -> Tensor:
    """Who may look at whom: bool [B, 1, T, T], true for earlier positions of the same document."""
    same_BTT = doc_BT[:, :, None] == doc_BT[:, None, :]
    return same_BTT.tril()[:, None]


class Attention(nn.Module):
    """Causal self-attention with grouped queries and normed queries and keys."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.q_proj = nn.Linear(cfg.d_model, cfg.n_head * cfg.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.d_model, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.d_model, cfg.n_kv_head * cfg.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.d_model, bias=False)
        self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
        self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)

    def forward(self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, D] to [B, T, D]; without a mask, all earlier positions are seen."""
        q_BNTH = rotate(self.q_norm(self._heads(self.q_proj(x_BTD))), cos_TH, sin_TH)
        k_BKTH = rotate(self.k_norm(self._heads(self.k_proj(x_BTD))), cos_TH, sin_TH)
        v_BKTH = self._heads(self.v_proj(x_BTD))
        out_BNTH = F.scaled_dot_product_attention(
            q_BNTH, k_BKTH, v_BKTH, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        out: Tensor = self.o_proj(out_BNTH.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x_BTM: Tensor) -> Tensor:
        B, T, M = x_BTM.shape
        return x_BTM.view(B, T, M // self.head_dim, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down_proj = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out


class Block(nn.Module):
    """Attention and MLP, each on a normed copy of the residual stream."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attention = Attention(cfg)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TH, sin_TH, mask)
        out: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return out


class Decoder(nn.Module):
    """Tokens to logits.

    Args:
        cfg: Dimensions.
        vocab_rows: Rows of the embedding: the vocabulary, padded (`padded_rows`).
    """

    def __init__(self, cfg: ModelConfig, vocab_rows: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(vocab_rows, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.final_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.output = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, vocab_rows, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """[V, D]: what turns the last hidden states into logits."""
        return self.embedding.weight if self.output is None else self.output.weight

    def hidden(self, tokens_BT: Tensor, doc_BT: Tensor | None = None) -> Tensor:
        """Last hidden states [B, T, D], normed.

        Args:
            tokens_BT: Token ids.
            doc_BT: Number of the document each token belongs to; attention stays inside a document.
                None: each sequence is one document.
        """
        cos_TH, sin_TH = rotary_tables(
            tokens_BT.shape[1], self.cfg.head_dim, self.cfg.rope_theta, device=tokens_BT.device
        )
        mask = None if doc_BT is None else document_mask(doc_BT)
        x_BTD = self.embedding(tokens_BT)
        cos_TH, sin_TH = cos_TH.to(x_BTD.dtype), sin_TH.to(x_BTD.dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_TH, sin_TH, mask)
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


def padded_rows(vocab_size: int) -> int:
    """Rows of the embedding: a multiple of 128, which matrix units like and tensor parallelism can split."""
    return -(-vocab_size // 128) * 128
