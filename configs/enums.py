"""Settings that are one of a few words, the values of their members too; each setting tells what its words mean."""

from enum import StrEnum

SourceFormat = StrEnum("SourceFormat", ["jsonl", "parquet", "text", "warc", "megatron", "hub"])
Runner = StrEnum("Runner", ["local", "slurm"])
LanguageBalance = StrEnum("LanguageBalance", ["natural", "temperature", "uniform", "parity"])
MixtureRule = StrEnum("MixtureRule", ["weights", "temperature", "unimax"])
Packing = StrEnum("Packing", ["concat", "best_fit"])
Precision = StrEnum("Precision", ["fp32", "bf16"])
Recompute = StrEnum("Recompute", ["auto", "none", "selective", "full"])
OptimizerName = StrEnum("OptimizerName", ["adamw", "muon", "ademamix"])
ScheduleName = StrEnum("ScheduleName", ["wsd", "cosine"])
DecayShape = StrEnum("DecayShape", ["linear", "sqrt", "cosine"])
Device = StrEnum("Device", ["cpu", "cuda", "rocm"])
"""What computes. ROCm devices present themselves to PyTorch as `cuda`."""
WandbMode = StrEnum("WandbMode", ["off", "offline", "online"])
Family = StrEnum("Family", ["agreement", "countries"])
"""Of tasks; what each asks stands in eval/suites.py."""
