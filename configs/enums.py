"""Settings that are one of a few words, which are the values of their members too."""

from enum import StrEnum

SourceFormat = StrEnum("SourceFormat", ["jsonl", "parquet", "text", "warc", "megatron", "hub"])
"""How a source of documents is stored."""
Runner = StrEnum("Runner", ["local", "slurm"])
"""What starts the tasks that prepare a corpus."""
LanguageBalance = StrEnum("LanguageBalance", ["natural", "temperature", "uniform", "parity"])
"""How much each language counts when a tokenizer is trained."""
MixtureRule = StrEnum("MixtureRule", ["weights", "temperature", "unimax"])
"""How token shares of the languages are chosen."""
Packing = StrEnum("Packing", ["concat", "best_fit"])
"""How documents are put into sequences."""
Precision = StrEnum("Precision", ["fp32", "bf16"])
"""Number format of weights in the forward and backward pass, or of gradients on the wire."""
ScheduleName = StrEnum("ScheduleName", ["wsd", "cosine"])
"""Shape of the learning rate over steps."""
Device = StrEnum("Device", ["cpu", "cuda", "rocm"])
"""What computes. ROCm devices present themselves to PyTorch as `cuda`."""
WandbMode = StrEnum("WandbMode", ["off", "offline", "online"])
"""Whether metrics also go to Weights & Biases."""
