"""Settings of the text: corpus, tokenizer, mixture. In the form that `schema.py` describes."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from configs.enums import MixtureRule, SourceFormat
from configs.rules import require, require_positive, require_share


@dataclass
class SourceConfig:
    """One source of documents."""

    format: SourceFormat = MISSING
    """jsonl (plain, .gz, .zst), parquet, text (a document a file), or hub (Hugging Face datasets)."""
    path: str = MISSING
    """File, folder or glob; `package:…` is a file shipped with Marathon; for hub a folder or a hub id."""
    licence: str = MISSING
    """SPDX identifier, or LicenseRef-…; carried to the shards and the model card."""
    origin: str = MISSING
    """Where the text comes from: a citation or an address, for the model card."""
    lang: str = ""
    """BCP-47 code of every document here; empty: each document names its own in `lang_field`."""
    lang_field: str = "lang"
    """Field of a record that holds the language."""
    text_field: str = "text"
    """Field of a record that holds the text."""
    id_field: str = "id"
    """Field of a record that holds a stable id; where it is absent, file and row number serve."""
    hub_config: str = ""
    """Configuration name of a Hugging Face dataset, often the language."""
    hub_split: str = "train"
    """Split of a Hugging Face dataset."""
    hub_revision: str = ""
    """Commit of a hub dataset: required for a hub id, since a branch can change under a run."""


@dataclass
class HoldoutConfig:
    """Which documents are kept out of training, for validation."""

    by_field: str = ""
    """Field of a record whose value decides; empty: a share of documents by the hash of their id."""
    by_values: list[int] = field(default_factory=list)
    """Documents whose `by_field` has one of these values are held out."""
    share: float = 0.0
    """Share of documents held out by the hash of their id, where no `by_field` is given."""
    max_docs_per_language: int = 1000
    """Validation reads at most so many documents a language, the first by hash of their id."""

    def __post_init__(self) -> None:
        require_share("corpus.holdout", share=self.share)
        require(
            bool(self.by_field) == bool(self.by_values),
            f"corpus.holdout.by_field = {self.by_field!r} with by_values = {self.by_values}",
            "a field needs values, and values need a field",
            "corpus.holdout.by_field=article 'corpus.holdout.by_values=[5,12]', or only corpus.holdout.share",
        )


@dataclass
class CorpusConfig:
    """Text in: the sources and what is kept of them."""

    sources: dict[str, SourceConfig] = MISSING
    """Sources by name."""
    languages: list[str] = field(default_factory=list)
    """Languages to keep (BCP-47); empty: all that occur."""
    holdout: HoldoutConfig = field(default_factory=HoldoutConfig)
    """Documents kept for validation."""
    max_bad_share: float = 0.01
    """Share of a source's records that may be quarantined before the stage stops."""

    def __post_init__(self) -> None:
        require_share("corpus", max_bad_share=self.max_bad_share)


@dataclass
class TokenizerConfig:
    """sentencepiece BPE, trained on the corpus unless a path is given."""

    path: str = ""
    """A `tokenizer.model` of sentencepiece to use as it is; empty: train one."""
    vocab_size: int = MISSING
    """Entries of the vocabulary, specials and 256 bytes included."""
    character_coverage: float = 0.9999
    """Share of characters that get an entry of their own; the rest is spelled in bytes."""
    language_alpha: float = 1.0
    """Languages weigh by bytes ** alpha when training: 1 natural, 0 all alike."""

    def __post_init__(self) -> None:
        require_share("tokenizer", character_coverage=self.character_coverage, language_alpha=self.language_alpha)
        found, rule = f"tokenizer.vocab_size = {self.vocab_size}", "bytes and specials take 260, it must be above 300"
        require(self.vocab_size > 300, found, rule, "4096 for a smoke run, 131072 for 24 languages")


@dataclass
class MixtureConfig:
    """How often each language is seen."""

    rule: MixtureRule = MixtureRule.temperature
    """weights: as given; temperature: tokens ** alpha; unimax: even, with a cap on epochs."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share by language, for the rule `weights`; normalised to 1."""
    alpha: float = 1.0
    """Exponent of the rule `temperature`: 1 natural, 0 all alike."""
    max_epochs: float = 4.0
    """No language is seen more often than this; UniMax gives what it would have had to the others."""
    allow_more_epochs: bool = False
    """Go on, with a warning, where a rule overspends `max_epochs`."""

    def __post_init__(self) -> None:
        require_share("mixture", alpha=self.alpha)
        require_positive("mixture", max_epochs=self.max_epochs, **self.weights)
