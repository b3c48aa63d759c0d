"""Settings that are one of a few words."""

from enum import Enum


class SourceFormat(Enum):
    """How a source of documents is stored."""

    jsonl = "jsonl"
    parquet = "parquet"
    text = "text"
    warc = "warc"
    megatron = "megatron"
    hub = "hub"


class Runner(Enum):
    """What starts the tasks that prepare a corpus."""

    local = "local"
    slurm = "slurm"


class LanguageBalance(Enum):
    """How much each language counts when a tokenizer is trained."""

    natural = "natural"
    temperature = "temperature"
    uniform = "uniform"
    parity = "parity"


class MixtureRule(Enum):
    """How token shares of the languages are chosen."""

    weights = "weights"
    temperature = "temperature"
    unimax = "unimax"


class Packing(Enum):
    """How documents are put into sequences."""

    concat = "concat"
    best_fit = "best_fit"


class Precision(Enum):
    """Number format of weights in the forward and backward pass, or of gradients on the wire."""

    fp32 = "fp32"
    bf16 = "bf16"


class ScheduleName(Enum):
    """Shape of the learning rate over steps."""

    wsd = "wsd"
    cosine = "cosine"


class Device(Enum):
    """What computes. ROCm devices present themselves to PyTorch as `cuda`."""

    cpu = "cpu"
    cuda = "cuda"
    rocm = "rocm"


class WandbMode(Enum):
    """Whether metrics also go to Weights & Biases."""

    off = "off"
    offline = "offline"
    online = "online"
