"""Settings of the text: corpus, tokenizer, mixture. In the form that `schema.py` describes."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from configs.enums import LanguageBalance, MixtureRule, Packing, Runner, SourceFormat
from configs.rules import POSITIVE, PositiveFloat, PositiveInt, Rule, Section, Share, require


@dataclass
class SourceConfig:
    """One source of documents."""

    format: SourceFormat = MISSING
    """jsonl (plain, .gz, .zst), parquet, text (a document a file), warc, megatron (.bin, .idx), or hub (datasets)."""
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
    url_field: str = "url"
    """Field of a record that holds the address it came from, which opt-outs are matched with; it may be absent."""
    licence_field: str = ""
    """Field of a record that holds the licence of this document; empty: all have `licence`."""
    tokenizer: str = ""
    """For megatron: the `tokenizer.model` that made its tokens."""
    hub_config: str = ""
    """Configuration name of a Hugging Face dataset, often the language."""
    hub_split: str = "train"
    """Split of a Hugging Face dataset."""
    hub_revision: str = ""
    """Commit of a hub dataset: required for a hub id, since a branch can change under a run."""

    def __post_init__(self) -> None:
        found = f"the source {self.path} with licence = {self.licence!r} and origin = {self.origin!r}"
        repair = "licence: an SPDX identifier or LicenseRef-…; origin: a citation or an address"
        require(bool(self.licence and self.origin), found, "text is told of with its licence and origin", repair)


@dataclass
class HoldoutConfig(Section, prefix="corpus.holdout"):
    """Which documents are kept out of training, for validation."""

    by_field: str = ""
    """Field of a record whose value decides; empty: a share of documents by the hash of their id."""
    by_values: list[int] = field(default_factory=list)
    """Documents whose `by_field` has one of these values are held out."""
    share: Share = 0.0
    """Share of documents held out by the hash of their id, where no `by_field` is given."""
    max_docs_per_language: int = 1000
    """Validation reads at most so many documents a language, the first by hash of their id."""

    def __post_init__(self) -> None:
        super().__post_init__()
        found = f"corpus.holdout.by_field = {self.by_field!r} with by_values = {self.by_values}"
        rule = "a field needs values, and values need a field"
        repair = "corpus.holdout.by_field=article 'corpus.holdout.by_values=[5,12]', or only corpus.holdout.share"
        require(bool(self.by_field) == bool(self.by_values), found, rule, repair)


@dataclass
class IdentifyConfig:
    """Which language a text is in, found out from the text."""

    model: str = ""
    """`lid176`, `langid`, or the path of a fastText model (GlotLID, OpenLID); empty: the source is believed."""
    second: str = ""
    """A second model, which has to agree in the languages of `confused`; empty: the first decides alone."""
    confused: list[list[str]] = field(default_factory=list)
    """Groups of languages that are easily taken for one another, such as [hr, bs, sr]."""
    min_score: float = 0.3
    """A text whose language is less sure than this is rejected; `clean.thresholds` may say so by language."""
    min_characters: int = 25
    """Shorter texts keep their declared language: there is not enough to go by."""

    def __post_init__(self) -> None:
        found = f"identify.second = {self.second!r} with identify.confused = {self.confused}"
        rule = "the second model is asked in the languages of `confused`, and only there"
        require(bool(self.second) == bool(self.confused), found, rule, "give both, or neither")


CRAWLERS = ("*", "GPTBot", "CCBot", "Google-Extended", "ClaudeBot", "anthropic-ai")


@dataclass
class OptOutConfig:
    """Who does not want their text to be used."""

    domains: list[str] = field(default_factory=list)
    """Files of domains or beginnings of addresses, one a line; `#` begins a comment."""
    ids: list[str] = field(default_factory=list)
    """Files of document ids, one a line."""
    robots: list[str] = field(default_factory=list)
    """robots.txt of hosts: WARC files that hold them, or JSON lines with `host`, `robots` and `date`."""
    agents: list[str] = field(default_factory=lambda: [*CRAWLERS])
    """A document is left out where one of these user agents may not fetch it."""


@dataclass
class CleanConfig:
    """What each document goes through, in this order; nothing of it unless asked for."""

    opt_out: OptOutConfig = field(default_factory=OptOutConfig)
    """Whose text is left out."""
    repair_unicode: bool = False
    """Mend text that was decoded wrongly, and drop control characters."""
    identify: IdentifyConfig = field(default_factory=IdentifyConfig)
    """Identification of languages."""
    thresholds: str = ""
    """YAML made by `marathon thresholds`; `package:data/thresholds.yaml` is shipped; empty: no quality filter."""
    scorer: str = ""
    """A fastText classifier of quality; empty: none."""
    scorer_label: str = "__label__hq"
    """The label of the classifier whose probability is the score."""
    min_quality: float = 0.0
    """Documents that the scorer gives less are rejected."""
    privacy: list[str] = field(default_factory=list)
    """Personal data to replace by tokens such as <email>: email, ip, phone, iban, card, national_id."""


@dataclass
class DedupConfig:
    """Which copies of a text are left out, within a language and across sources."""

    exact: bool = True
    """Texts that are alike but for spaces, case and punctuation."""
    near: bool = False
    """Texts that share most of their 5-grams too (MinHash)."""
    licence_order: list[str] = field(default_factory=list)
    """Licences from the freest on: of copies the one with the first of these stays, then the one with the lowest id."""


@dataclass
class DecontaminateConfig:
    """Training text that holds what the model will be asked in evaluation."""

    against: list[str] = field(default_factory=list)
    """Questions of evaluations to look for: JSON lines, all of whose strings count, or text files; empty: no search."""
    ngram: int = 13
    """A match is so many words in a row."""
    max_documents: int = 10
    """An n-gram in more documents than this is a common phrase and no match."""
    remove: bool = False
    """Leave such documents out; else they are only marked in the audit."""


@dataclass
class CorpusConfig(Section, prefix="corpus"):
    """Text in: the sources and what is kept of them."""

    sources: dict[str, SourceConfig] = MISSING
    """Sources by name."""
    languages: list[str] = field(default_factory=list)
    """Languages to keep (BCP-47); empty: all that occur."""
    holdout: HoldoutConfig = field(default_factory=HoldoutConfig)
    """Documents kept for validation."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """Cleaning of each document."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Copies."""
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    """Text of evaluations."""
    shard_bytes: int = 1 << 29
    """Text of a shard, in bytes: 512 MiB are about 130 M tokens."""
    max_bad_share: Share = 0.01
    """Share of a source's records that may be quarantined before the stage stops."""


SHIPPED_MODELS = ("lid176", "langid")
"""Names of models for `clean.identify` that come with the packages; all others are paths."""


def map_paths(corpus: CorpusConfig, change: Callable[[str], str]) -> None:
    """Puts `change(path)` in place of every path of a list or model that decides about documents."""
    clean = corpus.clean
    sections: list[tuple[Any, tuple[str, ...]]] = [
        (clean, ("thresholds", "scorer")),
        (clean.identify, ("model", "second")),
        (clean.opt_out, ("domains", "ids", "robots")),
        (corpus.decontaminate, ("against",)),
        *((source, ("tokenizer",)) for source in corpus.sources.values()),
    ]
    for section, names in sections:
        for name in names:
            value = getattr(section, name)
            if value not in SHIPPED_MODELS:
                setattr(section, name, [*map(change, value)] if isinstance(value, list) else value and change(value))


MAX_TASKS = 1000
"""Of an array: Slurm's MaxArraySize where a site sets none, less one."""
ARRAY_SIZE = Rule(lambda n: 0 < n <= MAX_TASKS, "must be the size of a Slurm array", f"1 to {MAX_TASKS}")


@dataclass
class TasksConfig(Section, prefix="tasks"):
    """Where a corpus is prepared; what comes out does not depend on it."""

    runner: Runner = Runner.local
    """local: processes on this machine; slurm: arrays of jobs, submitted from a login node."""
    workers: Annotated[int, Rule(lambda n: n >= 0, "cannot be negative", "0 for one a core")] = 0
    """local: processes at once; 0: one for each core."""
    tasks: Annotated[int, ARRAY_SIZE] = 64
    """slurm: jobs of an array; each does its share of the input files, languages or shards."""
    partition: str = ""
    """slurm: partition of nodes without accelerators."""
    account: str = ""
    """slurm: project to be billed; empty: the one in SBATCH_ACCOUNT, or the cluster's default."""
    time: str = "08:00:00"
    """slurm: time limit of a job; one that is ended by it goes on with the unit it was at when submitted again."""
    gib: PositiveInt = 8
    """slurm: memory of a job."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_told = self.runner is Runner.local or bool(self.partition)
        require(is_told, "tasks.partition = ''", "Slurm needs a partition", "tasks.partition=small, or tasks=lumi_c")


@dataclass
class TokenizerConfig(Section, prefix="tokenizer"):
    """sentencepiece BPE, trained on the corpus unless a path is given."""

    path: str = ""
    """A `tokenizer.model` of sentencepiece to use as it is; empty: train one."""
    vocab_size: int = MISSING
    """Entries of the vocabulary, specials and 256 bytes included."""
    character_coverage: Share = 0.9999
    """Share of characters that get an entry of their own; the rest is spelled in bytes."""
    special_tokens: list[str] = field(default_factory=list)
    """Tokens that text may hold, such as <email> in place of an address: one id each, never part of another token."""
    balance: LanguageBalance = LanguageBalance.natural
    """natural: languages weigh by their bytes; temperature: by bytes ** `language_alpha`; uniform: all alike; parity:
    by a search that lowers the tokens of the worst-off language for the same content."""
    language_alpha: Share = 0.3
    """Exponent of the balance `temperature`: 1 natural, 0 all alike."""
    parity_text: str = "package:data/samples/udhr-europe.jsonl.zst"
    """JSON lines of `lang`, `article`, `text`, the same in each language: `parity` and the report measure on them."""
    parity_rounds: PositiveInt = 6
    """Steps of the balance `parity`, each a training on the most frequent words of every language."""
    max_train_bytes_per_language: PositiveInt = 1 << 28
    """Text of a language that words are counted in, whole documents by the hash of their id. 256 MiB have a million
    or two of distinct words: about 20 GB of memory for 24 languages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        n_fixed = 260 + len(self.special_tokens)
        found, rule = f"tokenizer.vocab_size = {self.vocab_size}", f"bytes and specials take {n_fixed} entries"
        require(self.vocab_size > n_fixed + 40, found, rule, "4096 for a smoke run, 131072 for 24 languages")
        for token in self.special_tokens:
            # A bracket at both ends and nowhere else: no two of them overlap in any text.
            is_fit = re.fullmatch(r"<[^\s<>\u2581]+>", token) and not re.fullmatch(r"<(/?s|pad|unk|0x..)>", token)
            is_once = self.special_tokens.count(token) == 1
            rule = "each stands once, as one word in angle brackets; <s> </s> <pad> <unk> and <0x41> have their meaning"
            repair = "tokenizer.special_tokens=['<email>','<phone>']"
            require(bool(is_fit) and is_once, f"tokenizer.special_tokens: {token!r}", rule, repair)


FACTOR = Rule(lambda factor: factor >= 0, "a factor is not negative", "0 leaves it out")


@dataclass
class PhaseConfig(Section, prefix="mixture"):
    """How often each language and source is seen, in one stretch of a run."""

    rule: MixtureRule = MixtureRule.temperature
    """Shares of languages. weights: as given; temperature: tokens ** alpha; unimax: even, with a cap on epochs."""
    weights: Annotated[dict[str, float], POSITIVE] = field(default_factory=dict)
    """Share by language, for the rule `weights`; normalised to 1."""
    alpha: Share = 1.0
    """Exponent of the rule `temperature`: 1 natural, 0 all alike."""
    sources: Annotated[dict[str, float], FACTOR] = field(default_factory=dict)
    """Factor by source: within a language sources share by tokens times factor, 1 where none is given; 0 leaves out."""
    max_epochs: PositiveFloat = 4.0
    """No text is seen more often than this, what earlier phases showed included; UniMax gives the rest to others."""
    max_epochs_of: Annotated[dict[str, float], POSITIVE] = field(default_factory=dict)
    """The same by source, where it differs."""
    allow_more_epochs: bool = False
    """Go on, with a warning, where a rule overspends `max_epochs`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        found = f"mixture.rule = {self.rule.value} with mixture.weights = {self.weights}"
        rule = "weights belong to the rule `weights`, and it needs them"
        repair = "mixture.rule=weights 'mixture.weights={de:0.5,fr:0.5}', or no weights"
        require(bool(self.weights) == (self.rule is MixtureRule.weights), found, rule, repair)


@dataclass
class LaterPhaseConfig(PhaseConfig):
    """A mixture that takes over in mid-run; what it does not name has the defaults, not the values before it."""

    from_tokens: int = MISSING
    """Tokens of the run after which it begins."""


@dataclass
class MixtureConfig(PhaseConfig):
    """The mixture that a run begins with, the phases after it, and how documents are put into sequences."""

    phases: list[LaterPhaseConfig] = field(default_factory=list)
    """Later mixtures, in order."""
    packing: Packing = Packing.concat
    """concat: documents one after another, cut at the ends of sequences; best_fit: whole where they fit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        starts = [0, *(phase.from_tokens for phase in self.phases)]
        found = f"mixture.phases begin at {starts[1:]} tokens"
        rule = "each begins after the one before, and the first after 0"
        require(starts == sorted(set(starts)), found, rule, "put them in order")
