"""Bits per byte of held-out documents, by language.

One document is one request: documents are never concatenated, so none is context for another. A document is
`[bos] + text + [eos]`. The text is scored and nothing else: P(first token | bos) counts, bos and the final
eos do not, since the denominator is the bytes of the raw text. Bits per byte are sums over a language:
nats / ln 2 / bytes. They can be compared over the checkpoints of one run and between models; between
languages they mean little, since scripts differ in bytes a character.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.heldout import ValidDocument


class DocumentScore(NamedTuple):
    """What a model made of one document."""

    id: str
    lang: str
    nll_nats: float
    """Minus the log-likelihood of the text, in nats."""
    n_tokens: int
    """Tokens of the text: bos and eos not counted."""
    n_bytes: int
    """UTF-8 bytes of the raw text."""


@dataclass(frozen=True)
class Bpb:
    """Bits per byte of one language, with the 95 % interval of a bootstrap over documents."""

    bpb: float
    low: float
    high: float
    documents: int
    bytes: int
    tokens: int


class _Window(NamedTuple):
    document: int
    tokens: np.ndarray[Any, Any]
    n_context: int
    """Predictions at the front that an earlier window has already made."""


@torch.no_grad()
def score_documents(
    logits_fn: Callable[[Tensor], Tensor],
    documents: Sequence[ValidDocument],
    *,
    seq_len: int,
    batch_seqs: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
) -> list[DocumentScore]:
    """Scores this rank's share of the documents; `gather_scores` brings the shares together.

    `logits_fn` takes tokens (batch, sequence) padded on the right and gives logits (batch, sequence, rows); it
    has to be causal, and in evaluation mode. Documents longer than `seq_len` are read in windows of `seq_len`
    that advance by half, so that every token but those of the first window has half a window of context at
    least; later windows begin in mid-text, without bos. Documents are dealt out in order of length, which
    gives ranks equal work and batches little padding.
    """
    by_length = sorted(documents, key=lambda document: (-len(document.tokens), document.lang, document.id))
    shares = [_windows(by_length[r::world_size], seq_len) for r in range(world_size)]
    mine, windows, most = by_length[rank::world_size], shares[rank], max(map(len, shares))
    nll_nats = np.zeros(len(mine))
    for start in range(0, most, batch_seqs):
        batch = windows[start : start + batch_seqs]
        if not batch:  # weights that are sharded are gathered by all ranks together, or never
            logits_fn(torch.zeros(1, 1, dtype=torch.long, device=device))
            continue
        for window, nats in zip(batch, _score_batch(logits_fn, batch, device), strict=True):
            nll_nats[window.document] += nats
    return [
        DocumentScore(document.id, document.lang, float(nats), max(len(document.tokens) - 2, 0), document.n_bytes)
        for document, nats in zip(mine, nll_nats, strict=True)
    ]


def gather_scores(scores: list[DocumentScore]) -> list[DocumentScore]:
    """The scores of all ranks, on every rank; the scores themselves where there is one process."""
    if not torch.distributed.is_initialized():
        return scores
    shares: list[list[DocumentScore]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(shares, scores)
    return [score for share in shares for score in share]


def bits_per_byte(scores: Iterable[DocumentScore], *, bootstrap_samples: int, seed: int = 0) -> dict[str, Bpb]:
    """Bits per byte by language, in order of language.

    The interval is the 2.5th to the 97.5th percentile over `bootstrap_samples` resamplings of documents. The
    draws depend on the seed and the number of documents alone: checkpoints, and languages with parallel
    documents, are resampled alike. A language with one document has an interval of width 0: it has no spread
    to show.
    """
    by_lang = groupby(sorted(scores, key=attrgetter("lang", "id")), key=attrgetter("lang"))
    return {lang: _bpb(list(of_lang), bootstrap_samples, seed) for lang, of_lang in by_lang}


def mean_bpb(by_lang: dict[str, Bpb]) -> float:
    """The plain mean over languages: each counts alike, however much text it has."""
    return sum(entry.bpb for entry in by_lang.values()) / len(by_lang)


def _windows(documents: Sequence[ValidDocument], seq_len: int) -> list[_Window]:
    windows = []
    for document, text in enumerate(entry.tokens[:-1] for entry in documents):
        n_predictions, n_done, start = len(text) - 1, 0, 0
        while n_done < n_predictions:
            # seq_len tokens go in; one more is the target of the last of them.
            windows.append(_Window(document, text[start : start + seq_len + 1], n_context=n_done - start))
            n_done = min(start + seq_len, n_predictions)
            start += max(seq_len // 2, 1)
    return windows


def _score_batch(
    logits_fn: Callable[[Tensor], Tensor], batch: list[_Window], device: torch.device | str
) -> list[float]:
    # What is padded with does not matter: a causal model does not look to the right.
    tokens_BT = pad_sequence([torch.from_numpy(w.tokens.astype(np.int64)) for w in batch], batch_first=True).to(device)
    logits_BTV = logits_fn(tokens_BT[:, :-1])
    nats = []
    for window, tokens_T, logits_TV in zip(batch, tokens_BT, logits_BTV, strict=True):
        # Row by row: float32 logits of a whole batch can take more memory than the model.
        scored = slice(window.n_context, len(window.tokens) - 1)
        nll_T = F.cross_entropy(logits_TV[scored].float(), tokens_T[1:][scored], reduction="none")
        nats.append(nll_T.sum(dtype=torch.float64))
    return torch.stack(nats).tolist()


def _bpb(scores: list[DocumentScore], bootstrap_samples: int, seed: int) -> Bpb:
    n = len(scores)
    nats = np.array([score.nll_nats for score in scores])
    n_bytes = np.array([score.n_bytes for score in scores], dtype=np.float64)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=bootstrap_samples)
    low, high = np.percentile((counts @ nats) / (counts @ n_bytes), [2.5, 97.5]) / math.log(2)
    return Bpb(
        bpb=float(nats.sum() / n_bytes.sum() / math.log(2)),
        low=float(low),
        high=float(high),
        documents=n,
        bytes=int(n_bytes.sum()),
        tokens=sum(score.n_tokens for score in scores),
    )
