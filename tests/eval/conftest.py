"""A tiny tokenizer that behaves as a run's own one, and documents in its tokens."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Threads of tiny matrix products that wait for each other cost 4 to 17 times the work on a busy machine.
torch.set_num_threads(1)

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
TEXT = {
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności.",
}


@pytest.fixture(scope="session")
def tokenizer_adding() -> Callable[[str], PreTrainedTokenizerFast]:
    """Byte-level BPE by what it adds where special tokens are asked for, such as `<s> $A`."""

    def build(template: str) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=380, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(list(TEXT.values()) * 3, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, i) for i, token in enumerate(SPECIALS)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )

    return build


@pytest.fixture(scope="session")
def tokenizer(tokenizer_adding) -> PreTrainedTokenizerFast:
    return tokenizer_adding("<s> $A")


@pytest.fixture(scope="session")
def documents(tokenizer: PreTrainedTokenizerFast) -> list[SimpleNamespace]:
    """Twelve documents in three languages, of one to twenty sentences."""
    found = []
    for lang, sentence in TEXT.items():
        for i, n in enumerate((1, 20, 5, 2)):
            text = " ".join([sentence] * n)
            tokens = np.array([1, *tokenizer.encode(text, add_special_tokens=False), 2], dtype=np.uint16)
            found.append(SimpleNamespace(id=f"{lang}-{i}", lang=lang, tokens=tokens, n_bytes=len(text.encode())))
    return found
