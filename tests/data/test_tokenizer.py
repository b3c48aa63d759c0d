import hashlib
import io
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.text import TokenizerConfig
from data.files import find_files, read_lines
from data.tokenizer import Encoder, count_words, export, train

UDHR = [
    json.loads(line)
    for file in find_files("package:data/samples/udhr-europe.jsonl.zst", ())
    for line in read_lines(file.path)
]
ADVERSARIAL = [
    "".join(map(chr, range(32))),
    "a\0b\0\0",
    "\x7f\x80\x85\u2028\u2029\ufeff\ufffd\uffff",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1fa 👍🏽",
    "e\u0301\u0327 é ﬁ x² ½ №5 ™ Ⅷ ŀl Å Å ß ẞ İ ı",
    "שלום עולם \u202babc\u202c مرحبا",
    "def f(x):\n\tif x:\n\t\treturn  x   # \n\n\n    pass\r\n",
    " ",
    "          ",
    " leading and trailing ",
    "0123456789" * 30,
    "٣٤٥ १२३ ⅔",
    "<s> fake </s><s></s><pad><unk>",
    "<email><email> <<email>>\n<email <|turn|>email> <EMAIL>  <email>  x<email>y",
    "<0x41><0x0A> <0xFF>",
    "Straßeулицаδρόμος街道거리",
    "▅▂▁"[:2],
    "-" * 1000 + "=" * 77 + "." * 301,
    "abab" * 50 + "aba",
    "\U00010348\U000e0041\U0010ffff",
]


SPECIAL = ["<email>", "<|turn|>"]
"""Tokens 4 and 5."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 4096 entries for 46 languages; in its training text one special token is frequent."""
    words = count([record["text"] for record in UDHR] + ["Mail to <email>, or (<email>) or_<email>_or email."] * 500)
    path = tmp_path_factory.mktemp("tokenizer")
    export(train(words, TokenizerConfig(vocab_size=4096, special_tokens=SPECIAL)), path, SPECIAL)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(folder)


@pytest.fixture(scope="module")
def pieces(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def encode(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    offsets, ids = encoder.encode(texts)
    assert offsets[0] == 0 and offsets[-1] == len(ids) and len(offsets) == len(texts) + 1
    return [row.tolist() for row in np.split(ids, offsets[1:-1])]


def test_ids_are_those_of_sentencepiece_in_46_languages(
    encoder: Encoder, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    texts = [line for record in UDHR for line in [record["text"], *record["text"].split("\n")]]
    assert len({record["lang"] for record in UDHR}) == 46 and len(texts) > 4000
    ids = encode(encoder, texts)
    assert ids == pieces.encode(texts)
    assert [encoder.decode(i) for i in ids] == texts


def test_ids_are_those_of_sentencepiece_for_every_character(
    encoder: Encoder, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    every = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and i != 0x2581]
    random.Random(3).shuffle(every)
    texts = ["".join(every[i : i + 100]) for i in range(0, len(every), 100)]
    ids = encode(encoder, texts)
    assert ids == pieces.encode(texts)
    assert [encoder.decode(i) for i in ids] == texts


@pytest.mark.parametrize("text", ADVERSARIAL, ids=ascii)
def test_ids_are_those_of_sentencepiece_on_adversarial_text(
    encoder: Encoder, pieces: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    (ids,) = encode(encoder, [text])
    assert ids == pieces.encode(text)
    assert encoder.decode(ids) == text == pieces.decode(ids)
    assert not {0, 1, 2, 3} & set(ids)


SNIPPETS = st.sampled_from(
    [
        "<s>",
        "</s>",
        "<0x41>",
        "  ",
        "\n\t",
        "1234",
        "\u0301",
        "\u200d",
        "👍🏽",
        "ż",
        " de",
        "\0",
        *SPECIAL,
        "<email",
        ">",
    ]
)
TEXT = st.lists(st.text(st.characters(exclude_characters="\u2581", codec="utf-8")) | SNIPPETS).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_ids_are_those_of_sentencepiece_on_any_text(
    encoder: Encoder, pieces: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    (ids,) = encode(encoder, [text])
    assert ids == pieces.encode(text)
    assert encoder.decode(ids) == text
    assert not {0, 1, 2, 3} & set(ids)


def test_repetitions_are_merged_from_the_left_as_in_sentencepiece(tmp_path: Path) -> None:
    """A piece may be put together in several ways; on periodic text the order of merges then matters."""
    counts: Counter[str] = Counter()
    letters = random.Random(7)
    count_words("".join(letters.choice("aab b-") for _ in range(20_000)), counts)
    export(train(counts, TokenizerConfig(vocab_size=330)), tmp_path)
    texts = [
        (a * n + b) * m for a in ("a", "b", "ab", "-", " ") for b in ("", "a", " b") for n in range(9) for m in (1, 3)
    ]
    encoder = Encoder(tmp_path)
    offsets, ids = encoder.encode(texts)
    encoder.verify(texts, np.split(ids, offsets[1:-1]))


def test_a_word_of_a_million_letters_is_encoded_in_a_moment(
    encoder: Encoder, pieces: sentencepiece.SentencePieceProcessor
) -> None:
    text = "freiheit" * 125_000
    (ids,) = encode(encoder, [text])
    assert ids == pieces.encode(text)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_arrow_arrays_give_the_ids_of_lists(encoder: Encoder, kind: pa.DataType) -> None:
    texts = ["cut off", "", "Jeder", " Mensch\n", "", "cut off"]
    rows = pa.array(texts, kind)[1:-1]
    for column in (rows, pa.chunked_array([rows[:1], rows[1:]])):
        offsets, ids = encoder.encode(column)
        assert (offsets.dtype, ids.dtype) == (np.int64, np.uint32)
        assert np.split(ids, offsets[1:-1])[1].tolist() == encode(encoder, ["Jeder"])[0]
        assert encoder.decode(ids) == "Jeder Mensch\n" and len(offsets) == 5
    for nothing in ([], pa.array([], kind)):
        offsets, ids = encoder.encode(nothing)
        assert (offsets.tolist(), ids.tolist()) == ([0], [])


def test_verification_fails_on_a_difference(encoder: Encoder) -> None:
    _, ids = encoder.encode(["Alle Menschen"])
    encoder.verify(["Alle Menschen"], [ids])
    with pytest.raises(ValueError, match="differ from token 1"):
        encoder.verify(["Alle Menschen"], [ids + np.uint32([0, 1, *[0] * (len(ids) - 2)])])
    with pytest.raises(ValueError, match="differ from token 1"):
        encoder.verify(["Alle Menschen"], [ids[:1]])
    with pytest.raises(ValueError, match="does not come back"):
        encoder.verify(["a\u2581b"], [encoder.encode(["a\u2581b"])[1]])


def test_transformers_gives_the_same_ids_and_no_control_token_from_text(folder: Path, encoder: Encoder) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id, theirs.pad_token_id) == (1, 2, 0, 3)
    texts = [*ADVERSARIAL, *(record["text"] for record in UDHR[::31])]
    ids = encode(encoder, texts)
    assert theirs(texts, add_special_tokens=False).input_ids == ids
    assert theirs(texts).input_ids == [[1, *i] for i in ids]
    assert theirs.batch_decode(ids) == texts
    assert theirs.batch_decode([[1, *i, 2] for i in ids], skip_special_tokens=True) == texts


def test_a_special_token_is_one_id_and_part_of_no_other(encoder: Encoder, folder: Path) -> None:
    entries = encoder.entries()
    assert [entries[4], entries[5]] == SPECIAL and 3 not in entries
    assert encode(encoder, ["<email><|turn|><email>"]) == [[4, 5, 4]]
    assert encode(encoder, ["x <email>!"])[0].count(4) == 1
    assert 4 not in encode(encoder, ["<EMAIL> < email> <email"])[0]
    # It stands between a space, brackets and letters a thousand times; without it these would be learned together.
    learned = [text for i, text in entries.items() if i > 5]
    assert [text for text in learned if "email" in text] == [" email"]
    assert not [text for text in learned if len(text) > 1 and set("<>") & set(text)]
    glued = train(count([UDHR[0]["text"], *["or_<email>_or"] * 500]), TokenizerConfig(vocab_size=400))
    assert any("_<" in piece or ">_" in piece for piece in pieces_of(glued))


@pytest.mark.parametrize(
    "wrong", ["email", "<e mail>", "<>", "<a><b>", "</s>", "<unk>", "<0x41>", "<\u2581>", "<email>"]
)
def test_a_special_token_that_could_be_taken_for_another_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.special_tokens"):
        TokenizerConfig(vocab_size=4096, special_tokens=["<email>", wrong])


def test_a_given_tokenizer_without_a_special_token_is_refused(tmp_path: Path) -> None:
    model = train(
        count([record["text"] for record in UDHR[:31]]), TokenizerConfig(vocab_size=400, special_tokens=["<ip>"])
    )
    export(model, tmp_path, ["<ip>"])
    with pytest.raises(UserError, match="without <email> <phone>; it has <ip>"):
        export(model, tmp_path, ["<email>", "<ip>", "<phone>"])


def count(texts: list[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        count_words(text, counts)
    return counts


def pieces_of(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(len(processor))]


def train_plainly(vocab_size: int, lines: list[str], threads: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        character_coverage=0.9999, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, byte_fallback=True, split_digits=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, minloglevel=2, num_threads=threads,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("threads", [1, 3])
def test_counts_give_the_vocabulary_of_the_text_on_any_number_of_threads(threads: int) -> None:
    texts = [record["text"] for record in UDHR if record["lang"] in ("de", "el", "mt")]
    texts.append("def f(x):\n\treturn  {\n        'a': 12,   \n    }  \n</s> <s>\n")
    lines = [line for text in texts for line in re.split("[\n\t]", text) if line]
    ours = train(count(texts), TokenizerConfig(vocab_size=2000))
    assert pieces_of(ours) == pieces_of(train_plainly(2000, lines, threads))


def test_training_twice_gives_the_same_bytes_in_any_order() -> None:
    texts = [record["text"] for record in UDHR[:31]]
    cfg = TokenizerConfig(vocab_size=800)
    first, second = (train(count(t), cfg) for t in (texts, texts[::-1]))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()


def test_a_vocabulary_that_does_not_fit_the_text_is_refused_with_one_that_does() -> None:
    counts = count([record["text"] for record in UDHR[:5]])
    with pytest.raises(UserError, match=r"at most (\d+) pieces") as error:
        train(counts, TokenizerConfig(vocab_size=50_000))
    largest = int(re.search(r"at most (\d+)", str(error.value))[1])  # type: ignore[index]
    assert len(pieces_of(train(counts, TokenizerConfig(vocab_size=largest)))) == largest
    with pytest.raises(UserError, match=f"vocab_size = {largest + 1}"):
        train(counts, TokenizerConfig(vocab_size=largest + 1))
    with pytest.raises(UserError, match=r"alone take 3\d\d entries"):
        train(counts, TokenizerConfig(vocab_size=301))
    with pytest.raises(UserError, match="no text"):
        train(Counter(), TokenizerConfig(vocab_size=400))


def test_a_text_without_spaces_still_gives_a_tokenizer_that_knows_them(tmp_path: Path) -> None:
    export(train(Counter({"abcdefgh" * 9: 5, "hgfedcba" * 7: 3}), TokenizerConfig(vocab_size=301)), tmp_path)
    encoder = Encoder(tmp_path)
    assert encoder.decode(encoder.encode(["a b"])[1]) == "a b"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model_type": "unigram"}, "BPE False"),
        ({"normalization_rule_name": "nmt_nfkc"}, "kept as it is False"),
        ({"add_dummy_prefix": True}, "kept as it is False"),
        ({"byte_fallback": False}, "byte fallback False"),
        ({"bos_id": -1}, "</s> False"),
        ({"user_defined_symbols": ["a b"]}, "without spaces False"),
    ],
)
def test_a_given_tokenizer_that_loses_text_is_refused(tmp_path: Path, wrong: dict[str, object], said: str) -> None:
    model = io.BytesIO()
    good = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "byte_fallback": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(record["text"] for record in UDHR[:31]), model_writer=model, vocab_size=700,
        remove_extra_whitespaces=False, minloglevel=2, **(good | wrong),
    )  # fmt: skip
    with pytest.raises(UserError, match=said):
        export(model.getvalue(), tmp_path)


def test_the_raw_file_is_safe_too(folder: Path, encoder: Encoder) -> None:
    """Whoever loads `tokenizer.json` without our wrapper gets text from text as well."""
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert raw.encode("x</s>", add_special_tokens=False).ids == encode(encoder, ["x</s>"])[0]
    assert raw.encode("x</s>").ids == [1, *encode(encoder, ["x</s>"])[0]]


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        Encoder(tmp_path)
