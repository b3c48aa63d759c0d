"""The tokenizer: trained by sentencepiece, run at scale by `tokenizers`, with identical ids.

BPE without normalisation, so that decoding gives back every text exactly; byte fallback, so that there
is no unknown token; digits one by one. A control token such as `</s>` never comes out of text.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from configs.errors import UserError
from configs.text import TokenizerConfig
from data.files import readable
from data.sources import SPACE_MARK

MODEL, FAST, FAST_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"

# Where sentencepiece itself cuts a line when it trains. A line break or tab never is part of a longer piece: the
# trainer reads lines, and keeps the tab for itself. They are spelled as bytes, one token each.
_WORD = re.compile(r" *[^ \n\t]+| +")

_PROBES = (
    "  two  spaces ",
    "\tif x:\n\t\treturn ½ ﬁ x²\r\n",
    "e\u0301 \u00a0 \u200d 𐍈",
    "<s>a</s><pad><unk><0x41>",
    "1234",
)


def count_words(text: str, counts: Counter[str]) -> None:
    """Adds the words of a text, each with the spaces before it."""
    counts.update(_WORD.findall(text))


def train(counts_by_language: Mapping[str, Counter[str]], cfg: TokenizerConfig) -> bytes:
    """Trains on weighted word counts; returns the content of a `tokenizer.model`.

    Counts give the vocabulary that the text itself would give, in memory that grows with distinct words only, and
    make the balance of languages a weight. The result depends on the counts alone, not on threads or paths.
    Raises `UserError` where the vocabulary is too large or too small for the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{n}" for word, n in _weighted(counts_by_language, cfg.language_alpha)),
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
            required_chars=SPACE_MARK,  # spelled in bytes, a space would come back as U+2581
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            pad_piece=PAD,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _vocabulary_error(error, cfg) from None
    return model.getvalue()


def export(model: bytes, folder: Path) -> None:
    """Writes `tokenizer.model`, and `tokenizer.json` with its config, which give the same ids to `tokenizers`.

    Raises `UserError` where the model is not of the kind this can be said of.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    _require_lossless_bpe(pieces)
    bos, eos = pieces.id_to_piece(pieces.bos_id()), pieces.id_to_piece(pieces.eos_id())
    pad = pieces.id_to_piece(pieces.pad_id()) if pieces.pad_id() >= 0 else eos
    unk = pieces.id_to_piece(pieces.unk_id())
    fast = tokenizers.Tokenizer(
        models.BPE(
            vocab={pieces.id_to_piece(i): i for i in range(len(pieces))},
            merges=_merges(pieces),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    fast.normalizer = normalizers.Replace(" ", SPACE_MARK)
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, pieces.bos_id())]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "pad_token": pad,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        # Text that spells a control token is text: no document can end itself.
        "split_special_tokens": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).write_bytes(model)
    fast.save(str(folder / FAST))
    (folder / FAST_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_model(path: str) -> bytes:
    """Content of a `tokenizer.model` that the user names."""
    with readable(path):
        return Path(path).read_bytes()


class Encoder:
    """Text to ids at scale, on all cores, through the exported `tokenizer.json`."""

    def __init__(self, folder: Path) -> None:
        self._fast = tokenizers.Tokenizer.from_file(str(folder / FAST))
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=read_model(str(folder / MODEL)))
        self.vocab_size: int = len(self._pieces)
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.pad_id: int = self._pieces.pad_id() if self._pieces.pad_id() >= 0 else self.eos_id

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without `<s>` and `</s>`."""
        return [e.ids for e in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; `decode(encode(x)) == x` for every x without U+2581."""
        return str(self._fast.decode(ids, skip_special_tokens=False))

    def verify(self, texts: list[str], ids: list[list[int]]) -> None:
        """Raises `ValueError` unless sentencepiece gives the same ids and they decode to the same text."""
        for text, ours, theirs in zip(texts, ids, self._pieces.encode(texts), strict=True):
            if ours != theirs:
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
                raise ValueError(
                    f"tokenizers and sentencepiece differ from token {at}: {ours[at : at + 5]} against "
                    f"{theirs[at : at + 5]}, after {self.decode(ours[max(0, at - 10) : at])!r}"
                )
            if self.decode(ours) != text:
                raise ValueError(f"the text does not come back from its tokens: {text[:200]!r}")


def _weighted(counts_by_language: Mapping[str, Counter[str]], alpha: float) -> Iterator[tuple[str, int]]:
    """Counts summed over languages, those of a language of n bytes times (n / largest) ** (alpha - 1)."""
    n_bytes = {lang: sum(len(w.encode()) * n for w, n in counts.items()) for lang, counts in counts_by_language.items()}
    total: Counter[str] = Counter()
    for lang, counts in sorted(counts_by_language.items()):
        # The largest language keeps its counts and the others gain, so that no count is rounded to nothing.
        weight = (n_bytes[lang] / max(n_bytes.values())) ** (alpha - 1) if n_bytes[lang] else 0.0
        for word, n in counts.items():
            total[word] += round(n * weight)
    yield from sorted(total.items())


def _vocabulary_error(error: RuntimeError, cfg: TokenizerConfig) -> UserError:
    text = str(error)
    found = f"tokenizer.vocab_size = {cfg.vocab_size}"
    if largest := re.search(r"too high .* value <= (\d+)", text):
        return UserError(
            found,
            f"the training text gives at most {largest[1]} pieces",
            f"tokenizer.vocab_size={largest[1]} or less, or more text" if int(largest[1]) > 300 else "more text",
        )
    if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", text):
        return UserError(
            found,
            f"specials, bytes and single characters alone take {needed[1]} entries",
            f"tokenizer.vocab_size={int(needed[1]) * 2} or a lower tokenizer.character_coverage",
        )
    if "sentences_.empty()" in text:
        return UserError("no text to train the tokenizer on", "it is trained on the training split", "add documents")
    raise error


def _require_lossless_bpe(pieces: sentencepiece.SentencePieceProcessor) -> None:
    learned = [i for i in range(len(pieces)) if _is_learned(pieces, i)]
    # BPE numbers its pieces by rank: their scores are 0, -1, -2, …; those of other models are probabilities.
    is_bpe = [pieces.get_score(i) for i in learned] == [-float(rank) for rank in range(len(learned))]
    has_prefix = pieces.id_to_piece(pieces.encode("x")[0]).startswith(SPACE_MARK)
    is_lossless = not has_prefix and all(pieces.decode(pieces.encode(probe)) == probe for probe in _PROBES)
    has_bytes = all(pieces.is_byte(pieces.piece_to_id(f"<0x{byte:02X}>")) for byte in range(256))
    has_ends = pieces.bos_id() >= 0 and pieces.eos_id() >= 0
    if not (is_bpe and is_lossless and has_bytes and has_ends):
        raise UserError(
            f"tokenizer.path: BPE {is_bpe}, text kept as it is {is_lossless}, byte fallback {has_bytes}, "
            f"<s> and </s> {has_ends}",
            "a tokenizer is a sentencepiece BPE model with byte fallback, <s>, </s> and no normalisation",
            "train one (tokenizer.path= empty), or train yours with identity normalisation and without dummy prefix",
        )


def _merges(pieces: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, in the order of ids: sentencepiece merges by the result's rank."""
    learned = {pieces.id_to_piece(i): i for i in range(len(pieces)) if _is_learned(pieces, i)}
    return [
        (piece[:cut], piece[cut:])
        for piece in learned
        for cut in range(1, len(piece))
        if piece[:cut] in learned and piece[cut:] in learned
    ]


def _is_learned(pieces: sentencepiece.SentencePieceProcessor, i: int) -> bool:
    return not (pieces.is_control(i) or pieces.is_byte(i) or pieces.is_unknown(i))
