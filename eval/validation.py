"""Bits per byte of held-out documents, by language.

No document is context for another. Of `[bos] + text + [eos]` the text alone is scored: P(first token | bos) counts,
bos and eos do not, since the denominator is the bytes of the raw text. Bits per byte, sums of nats / ln 2 / bytes, can
be compared between models; between languages they mean little, since scripts differ in bytes a character.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.heldout import ValidDocument


class DocumentScore(NamedTuple):
    """Minus the log-likelihood of a document's text, its tokens without bos and eos, and its UTF-8 bytes."""

    id: str
    lang: str
    nll_nats: float
    n_tokens: int
    n_bytes: int


class Bpb(NamedTuple):
    """Bits per byte of one language, with the 95 % interval of a bootstrap over documents."""

    bpb: float
    low: float
    high: float
    documents: int
    bytes: int
    tokens: int


_Window = tuple[int, np.ndarray[Any, Any], int]
"""Place of a document, a part of its tokens, and how many predictions at its front an earlier window has made."""


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

    `logits_fn`, causal, takes tokens (batch, sequence) padded on the right and gives logits (batch, sequence, rows).
    Longer documents are read in windows of `seq_len` that advance by half, so that tokens of all but the first have
    half a window of context at least. Documents are dealt out by length: ranks have equal work, batches little padding.
    """
    by_length = sorted(documents, key=lambda document: (-len(document.tokens), document.lang, document.id))
    shares = [list(_windows(by_length[r::world_size], seq_len)) for r in range(world_size)]
    mine, most = by_length[rank::world_size], max(map(len, shares))
    nll_nats = np.zeros(len(mine))
    for start in range(0, most, batch_seqs):
        batch = shares[rank][start : start + batch_seqs]
        if not batch:  # weights that are sharded are gathered by all ranks together, or never
            logits_fn(torch.zeros(1, 1, dtype=torch.long, device=device))
            continue
        for (place, *_), nats in zip(batch, _score_batch(logits_fn, batch, device), strict=True):
            nll_nats[place] += nats
    return [
        DocumentScore(document.id, document.lang, nats, max(len(document.tokens) - 2, 0), document.n_bytes)
        for document, nats in zip(mine, nll_nats.tolist(), strict=True)
    ]


def gather_scores(scores: list[DocumentScore]) -> list[DocumentScore]:
    """The scores of all ranks, on every rank; the scores themselves where there is one process."""
    if not torch.distributed.is_initialized():
        return scores
    shares: list[list[DocumentScore]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(shares, scores)
    return [score for share in shares for score in share]


def bits_per_byte(scores: Iterable[DocumentScore], *, bootstrap_samples: int, seed: int = 0) -> dict[str, Bpb]:
    """Bits per byte by language, in order of language; with one document, the interval has width 0.

    The draws depend on the seed and the number of documents alone: checkpoints, and languages with parallel documents,
    are resampled alike.
    """
    by_lang = {}
    for lang, of_lang in groupby(sorted(scores, key=attrgetter("lang", "id")), key=attrgetter("lang")):
        _, _, nats, n_tokens, n_bytes = (np.array(column) for column in zip(*of_lang, strict=True))
        n = len(nats)
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=bootstrap_samples)
        low, high = np.percentile((counts @ nats) / (counts @ n_bytes), [2.5, 97.5]) / math.log(2)
        bpb = nats.sum() / n_bytes.sum() / math.log(2)
        by_lang[lang] = Bpb(float(bpb), float(low), float(high), n, int(n_bytes.sum()), int(n_tokens.sum()))
    return by_lang


def mean_bpb(by_lang: dict[str, Bpb]) -> float:
    """The plain mean over languages: each counts alike, however much text it has."""
    return sum(entry.bpb for entry in by_lang.values()) / len(by_lang)


def _windows(documents: Sequence[ValidDocument], seq_len: int) -> Iterator[_Window]:
    for place, document in enumerate(documents):
        text, n_done, start = document.tokens[:-1], 0, 0
        while n_done < len(text) - 1:
            # seq_len tokens go in; one more is the target of the last of them.
            yield place, text[start : start + seq_len + 1], n_done - start
            n_done = start + seq_len
            start += max(seq_len // 2, 1)


def _score_batch(
    logits_fn: Callable[[Tensor], Tensor], batch: list[_Window], device: torch.device | str
) -> list[float]:
    # What is padded with does not matter: a causal model does not look to the right.
    texts = [torch.from_numpy(tokens.astype(np.int64)) for _, tokens, _ in batch]
    tokens_BT = pad_sequence(texts, batch_first=True).to(device)
    logits_BTV, nats = logits_fn(tokens_BT[:, :-1]), []
    for (_, text, n_context), tokens_T, logits_TV in zip(batch, tokens_BT, logits_BTV, strict=True):
        # Row by row: float32 logits of a whole batch can take more memory than the model.
        scored = slice(n_context, len(text) - 1)
        nll_T = F.cross_entropy(logits_TV[scored].float(), tokens_T[1:][scored], reduction="none")
        nats.append(nll_T.sum(dtype=torch.float64))
    return torch.stack(nats).tolist()
