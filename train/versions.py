"""Versions of DeepSpeed and torch that train wrongly without a word, from DeepSpeed's own history of changes."""

from packaging.specifiers import SpecifierSet

KNOWN_BAD = (
    (">=0.18.6,<0.19.0", "", "ZeRO-1 in bf16", "ZeRO-1 in bf16 loses most of the last micro batch (pull request 7985)"),
    ("<0.18.9", ">=2.10", "ZeRO-3", "ZeRO-3 races with torch 2.10 and later, which gives NaN (pull request 7898)"),
    ("<0.19.5", "", "", "gradients and checkpoints were mended up to 0.19.5; 0.19.5 and later have what Marathon uses"),
)
"""Ranges of DeepSpeed and torch, the layouts that they are bad for, and what they do there."""


def known_bad(deepspeed: str | None, pytorch: str | None, layout: str = "") -> str:
    """What these versions do wrong in a layout such as `ZeRO-1 in bf16`, or else in any; empty where it is nothing."""
    for deepspeeds, pytorches, layouts, harm in KNOWN_BAD:
        if is_within(deepspeed, deepspeeds) and is_within(pytorch, pytorches) and layouts in (layout or layouts):
            return f"DeepSpeed {deepspeeds}: {harm}"
    return ""


def is_within(version: str | None, ranges: str) -> bool:
    """Whether a version lies in the ranges; one that is not installed lies in none."""
    # Clusters' builds carry names such as 2.10.0a0+git: they count as the release that they lead to.
    return version is not None and SpecifierSet(ranges).contains(version, prereleases=True)
