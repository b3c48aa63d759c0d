"""Versions of DeepSpeed and torch that compute something else than they should, with the settings that show it."""

from collections.abc import Callable

from packaging.version import Version

from configs.enums import Precision
from configs.errors import UserError
from configs.schema import EngineConfig

KNOWN_BAD: tuple[tuple[Callable[[Version, Version, EngineConfig], bool], str], ...] = (
    (
        lambda ds, _, cfg: (
            Version("0.18.6") <= ds < Version("0.19.0") and cfg.zero_stage == 1 and cfg.precision is Precision.bf16
        ),
        "DeepSpeed 0.18.6 to 0.18.10 lose most of the last micro batch with ZeRO-1 in bf16 (its pull request 7985)",
    ),
    (
        lambda ds, pt, cfg: ds < Version("0.18.9") and pt >= Version("2.10") and cfg.zero_stage == 3,
        "DeepSpeed before 0.18.9 races with torch 2.10 and later in ZeRO-3 (its pull request 7898)",
    ),
    (
        lambda ds, _, __: ds < Version("0.19.5"),
        "Marathon is tested with DeepSpeed 0.19.5 and later, and uses parts of it that older versions lack",
    ),
)


def refuse_known_bad(deepspeed: str, pytorch: str, cfg: EngineConfig) -> None:
    """Raises `UserError` for versions that compute something else than they should with these settings."""
    for is_bad, reason in KNOWN_BAD:
        if is_bad(Version(deepspeed), Version(pytorch), cfg):
            raise UserError(
                f"DeepSpeed {deepspeed} with torch {pytorch}, ZeRO-{cfg.zero_stage} in {cfg.precision.value}",
                reason,
                "a container or environment with DeepSpeed 0.19.5 or later: slurm/build_env.sh",
            )
