"""What a setting has to keep by itself, said in the same words for all; and the names of settings and their groups."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

from configs.errors import UserError

GROUPS = Path(__file__).parent
"""Folder of the groups of values in YAML."""


class Rule(NamedTuple):
    """What a value, or each value of a dictionary, has to keep."""

    holds: Callable[[float], bool]
    rule: str
    repair: str


POSITIVE = Rule(lambda value: value > 0, "must be greater than 0", "give a positive number")

PositiveInt = Annotated[int, POSITIVE]
PositiveFloat = Annotated[float, POSITIVE]
NaturalInt = Annotated[int, Rule(lambda value: value >= 0, "cannot be negative", "0 or more")]
Decay = Annotated[float, Rule(lambda value: 0 < value < 1, "must lie between 0 and 1", "0.9 keeps nine tenths a step")]
Share = Annotated[float, Rule(lambda value: 0 <= value <= 1, "is a share: 0 to 1", "0.1 means 10 %")]


@dataclass
class Section:
    """Settings whose rules are checked when they are made; `prefix` is the section's name on the command line."""

    prefix: ClassVar[str]

    def __init_subclass__(cls, prefix: str = "") -> None:
        cls.prefix = prefix or cls.prefix

    def __post_init__(self) -> None:
        for setting in fields(self):
            name, value = f"{self.prefix}.{setting.name}", getattr(self, setting.name)
            keyed = value if isinstance(value, dict) else {"": value}
            for rule in getattr(setting.type, "__metadata__", ()):
                for key, each in keyed.items():
                    require(rule.holds(each), f"{name}.{key}".rstrip(".") + f" = {each}", rule.rule, rule.repair)


def require(holds: bool, found: str, rule: str, repair: str) -> None:
    """Raises `UserError` unless the rule holds."""
    if not holds:
        raise UserError(found, rule, repair)


def setting_names(section: type, prefix: str = "") -> list[str]:
    """Dotted names of the settings of a section and of the sections in it, in the order of the schema."""
    names = []
    for setting in fields(section):
        nested = setting.type if isinstance(setting.type, type) and is_dataclass(setting.type) else None
        names += setting_names(nested, f"{prefix}{setting.name}.") if nested else [f"{prefix}{setting.name}"]
    return names


def groups() -> dict[str, list[Path]]:
    """Files of each group of values, by name; a group may stand in another, as corpus/clean."""
    found: dict[str, list[Path]] = {}
    for path in sorted(GROUPS.glob("*/**/*.yaml")):
        found.setdefault(str(path.parent.relative_to(GROUPS)), []).append(path)
    return found
