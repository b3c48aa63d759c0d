"""The tokenizer: trained by sentencepiece, run at scale by gigatoken, loaded by transformers, with identical ids.

BPE without normalisation, so that decoding gives back every text exactly; byte fallback, so that there
is no unknown token; digits one by one. A control token such as `</s>` never comes out of text; a declared special
token such as `<email>` does, whole and never as a part of a longer piece.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import decoders, models, normalizers, processors

from configs.errors import UserError
from configs.text import TokenizerConfig
from data.files import readable, write_whole
from data.sources import SPACE_MARK

MODEL, FAST, FAST_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"

# Where sentencepiece itself cuts a line when it trains. A line break or tab never is part of a longer piece: the
# trainer reads lines, and keeps the tab for itself. They are spelled as bytes, one token each.
_WORD = re.compile(r" *[^ \n\t]+| +")

_PROBE = "  two  spaces \n\tif x:\n\t\treturn ½ ﬁ x²\r\ne\u0301 \u00a0 \u200d 𐍈 <s>a</s><pad><unk><0x41> 1234 "


def count_words(text: str, counts: Counter[str]) -> None:
    """Adds the words of a text, each with the spaces before it."""
    counts.update(_WORD.findall(text))


def train(words: Counter[str], cfg: TokenizerConfig) -> bytes:
    """Trains on counted words; returns the content of a `tokenizer.model`.

    Counts give the vocabulary that the text itself would give, in memory that grows with distinct words only, and
    make the balance of languages a weight. The result depends on the counts alone, not on threads or paths.
    Raises `UserError` where the vocabulary is too large or too small for the text.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{n}" for word, n in sorted(words.items())),
            input_format="tsv",
            model_writer=model,
            model_type="bpe",
            vocab_size=cfg.vocab_size,
            character_coverage=cfg.character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=cfg.special_tokens,
            required_chars=SPACE_MARK,  # spelled in bytes, a space would come back as U+2581
            pad_id=3,  # after <unk>, <s> and </s>, which have 0, 1 and 2
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _vocabulary_error(error, cfg) from None
    return model.getvalue()


def count_tokens(model: bytes, texts: list[str]) -> int:
    """Tokens of all texts together."""
    return sum(map(len, SentencePieceProcessor(model_proto=model).encode(texts)))


def export(model: bytes, folder: Path, special_tokens: Sequence[str] = ()) -> None:
    """Writes `tokenizer.model`, and `tokenizer.json` with its config, which give the same ids to other programs.

    Raises `UserError` where the model is not of the kind this can be said of, or lacks one of `special_tokens`.
    """
    pieces = SentencePieceProcessor(model_proto=model)
    declared, learned = _entries(pieces)
    _require_lossless_bpe(pieces, declared, learned)
    if lacking := sorted(set(special_tokens) - set(declared)):
        found = f"tokenizer.path: a model without {' '.join(lacking)}; it has {' '.join(declared) or 'none of its own'}"
        rule = "tokenizer.special_tokens are tokens of their own in the model that is used"
        repair = "train one (tokenizer.path= empty), or take them out of tokenizer.special_tokens"
        raise UserError(found, rule, repair)
    bos, eos, unk = pieces.id_to_piece([pieces.bos_id(), pieces.eos_id(), pieces.unk_id()])
    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    bpe = models.BPE(vocab=vocab, merges=_merges(learned), unk_token=unk, fuse_unk=True, byte_fallback=True)
    fast = tokenizers.Tokenizer(bpe)
    fast.normalizer = normalizers.Replace(" ", SPACE_MARK)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    single, pair, ids = f"{bos} $A", f"{bos} $A {bos} $B", [(bos, pieces.bos_id())]
    fast.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    # They are text like any other to whoever loads this: not skipped when decoding, found in text as in sentencepiece.
    fast.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in declared])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "pad_token": pieces.id_to_piece(pieces.pad_id()) if pieces.pad_id() >= 0 else eos,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        # Text that spells a control token is text: no document can end itself.
        "split_special_tokens": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).write_bytes(model)
    fast.save(str(folder / FAST))
    write_whole(folder / FAST_CONFIG, json.dumps(config, indent=2) + "\n")  # the last: it says that all is there


def read_model(path: str) -> bytes:
    """Content of a file of a tokenizer; raises `UserError` where it cannot be read."""
    with readable(path):
        return Path(path).read_bytes()


class Encoder:
    """Text to ids at scale, on one core: the processes that use one each share out the cores."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pieces = SentencePieceProcessor(model_proto=read_model(str(folder / MODEL)))
        self.vocab_size: int = len(self._pieces)
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.pad_id: int = self._pieces.pad_id() if self._pieces.pad_id() >= 0 else self.eos_id

    @cached_property
    def _bulk(self) -> Any:
        import gigatoken

        # Not by path: one that is not there would be asked of a hub.
        return gigatoken.Tokenizer.from_json(read_model(str(self._folder / FAST)))

    def encode(self, texts: Any) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """(offsets, ids) of n texts, without `<s>` and `</s>`: text i is `ids[offsets[i] : offsets[i + 1]]`.

        `texts` is a list of `str`, or an arrow array of strings, which is not copied where it is of large strings.
        One call with many texts is several times faster than many calls: words are remembered within a call.
        """
        import awkward  # type: ignore[import-untyped]
        import pyarrow as pa

        from data.columns import strings

        column = strings(texts) if isinstance(texts, list) else texts.cast(pa.large_string())
        rows = self._bulk.encode_batch(awkward.from_arrow(column), parallel=False).layout
        return rows.offsets.data, rows.content.data

    def entries(self) -> dict[int, str]:
        """Text of each special token and learned piece by its id: all that text can give, but for single bytes."""
        declared, learned = _entries(self._pieces)
        return {self._pieces.piece_to_id(piece): piece.replace(SPACE_MARK, " ") for piece in declared + learned}

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of ids; `decode(ids of x) == x` for every x without U+2581."""
        return str(self._bulk.decode(ids), "utf-8")

    def verify(self, texts: Sequence[str], ids: Sequence[NDArray[Any]]) -> None:
        """Raises `ValueError` unless sentencepiece gives each text the same ids and they decode to the same text."""
        for text, found, theirs in zip(texts, ids, self._pieces.encode(list(texts)), strict=True):
            if (ours := found.tolist()) != theirs:
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
                pair = f"{ours[at : at + 5]} against {theirs[at : at + 5]}"
                after = self.decode(ours[max(0, at - 10) : at])
                raise ValueError(f"gigatoken and sentencepiece differ from token {at}: {pair}, after {after!r}")
            if self.decode(ours) != text:
                raise ValueError(f"the text does not come back from its tokens: {text[:200]!r}")


def _vocabulary_error(error: RuntimeError, cfg: TokenizerConfig) -> UserError:
    text, found = str(error), f"tokenizer.vocab_size = {cfg.vocab_size}"
    if largest := re.search(r"too high .* value <= (\d+)", text):
        repair = f"tokenizer.vocab_size={largest[1]} or less, or more text" if int(largest[1]) > 300 else "more text"
        return UserError(found, f"the training text gives at most {largest[1]} pieces", repair)
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        repair = f"tokenizer.vocab_size={int(needed[1]) * 2} or a lower tokenizer.character_coverage"
        return UserError(found, f"specials, bytes and single characters alone take {needed[1]} entries", repair)
    if "sentences_.empty()" in text:
        return UserError("no text to train the tokenizer on", "it is trained on the training split", "add documents")
    raise error


def _entries(pieces: SentencePieceProcessor) -> tuple[list[str], list[str]]:
    """Special tokens, which sentencepiece numbers before the bytes, and learned pieces, which come after them."""
    first_byte = pieces.piece_to_id("<0x00>")
    declared = [i for i in range(first_byte) if not (pieces.is_control(i) or pieces.is_unknown(i))]
    return pieces.id_to_piece(declared), pieces.id_to_piece([*range(first_byte + 256, len(pieces))])


def _require_lossless_bpe(pieces: SentencePieceProcessor, declared: list[str], learned: list[str]) -> None:
    facts = {
        # BPE numbers its pieces by rank; scores of other models are probabilities.
        "BPE": [pieces.get_score(i) for i in pieces.piece_to_id(learned)] == [-float(i) for i in range(len(learned))],
        "text kept as it is": pieces.decode(pieces.encode(_PROBE)) == _PROBE
        and not pieces.id_to_piece(pieces.encode("x")[0]).startswith(SPACE_MARK),
        "byte fallback": all(pieces.is_byte(pieces.piece_to_id(f"<0x{byte:02X}>")) for byte in range(256)),
        "<s> and </s>": pieces.bos_id() >= 0 and pieces.eos_id() >= 0,
        # sentencepiece looks for them after it has changed spaces, others before.
        "declared symbols without spaces": not any({" ", SPACE_MARK} & set(token) for token in declared),
    }
    if not all(facts.values()):
        found = f"tokenizer.path: {', '.join(f'{what} {is_so}' for what, is_so in facts.items())}"
        rule = "a tokenizer is a sentencepiece BPE model with byte fallback, <s>, </s> and no normalisation"
        yours = "or train yours with identity normalisation and without dummy prefix"
        raise UserError(found, rule, f"train one (tokenizer.path= empty), {yours}")


def _merges(learned: list[str]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, in the order of ids: sentencepiece merges by the result's rank."""
    known = set(learned)
    pairs = ((piece[:cut], piece[cut:]) for piece in learned for cut in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in known and right in known]
