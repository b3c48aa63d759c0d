"""What a field has to keep by itself, said in the same words for all."""

from dataclasses import fields, is_dataclass

from configs.errors import UserError


def require(holds: bool, found: str, rule: str, repair: str) -> None:
    """Raises `UserError` unless the rule holds."""
    if not holds:
        raise UserError(found, rule, repair)


def require_positive(section: str, **values: float) -> None:
    """Every value is above 0."""
    for name, value in values.items():
        require(value > 0, f"{section}.{name} = {value}", "must be greater than 0", "give a positive number")


def require_share(section: str, **values: float) -> None:
    """Every value lies between 0 and 1."""
    for name, value in values.items():
        require(0 <= value <= 1, f"{section}.{name} = {value}", "is a share: 0 to 1", "0.1 means 10 %")


def setting_names(section: type, prefix: str = "") -> list[str]:
    """Dotted names of the settings of a section and of the sections in it, in the order of the schema."""
    names = []
    for setting in fields(section):
        nested = setting.type if isinstance(setting.type, type) and is_dataclass(setting.type) else None
        names += setting_names(nested, f"{prefix}{setting.name}.") if nested else [f"{prefix}{setting.name}"]
    return names
