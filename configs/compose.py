"""From overrides to one checked `RunConfig`, and to and from the frozen file of a run.

Hydra is imported inside `compose` alone: ranks read the frozen file and never pay for a composition. What Hydra lets
through (`+model.typo=1` sets a key that no schema knows) is closed by merging the result once more onto the schema.
"""

import difflib
import hashlib
import os
import re
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_load

from configs.checks import check
from configs.enums import SourceFormat
from configs.errors import UserError
from configs.rules import GROUPS, groups, setting_names
from configs.schema import RunConfig
from configs.text import map_paths

SCHEMA = "configs/schema.py or configs/text.py"
"""Where the settings stand."""
FREE_KEYS = ("mixture.weights", "mixture.sources", "mixture.max_epochs_of")
"""Settings whose keys are names of languages or sources."""
FREE_SECTIONS = ("train.", "tasks.", "mixture.", "engine.", "faults.", "suite.", "release.", "log.", "cluster.")
"""Sections that may change under the name of a run that has begun, …"""
FIXED = (
    *("train.tokens_per_step", "train.batch_ramp", "train.seq_len", "train.z_loss", "train.begin_from"),
    "mixture.packing",
)
"""… but for what decides first weights, which samples stand at a position and make a step, and their loss."""
NOTHING: tuple[Any, ...] = (None, "", [])
"""A list of sections that is empty has a name of its own, one that is not has those of its sections."""


def compose(overrides: list[str]) -> RunConfig:
    """Composes, checks and returns the config that `overrides` (Hydra's grammar) describe."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for override in overrides:
        if "=" not in override:
            repair = f"experiment={override.lstrip('-')}, or name=…"
            raise UserError(override, "arguments have the form SETTING=VALUE", repair)
    # Hydra would want a plus sign for each of these, and add a whole one to what there is.
    free = [o for o in overrides if o.startswith(FREE_KEYS)]
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("configs", version_base="1.3"):
            composed = hydra.compose("run", [o for o in overrides if o not in free])
        if composed.rehearse and (toy := _toy_settings()) != overrides[: len(toy)]:
            return compose([*toy, *overrides])
        for given in OverridesParser.create().parse_overrides(free):
            OmegaConf.update(composed, given.key_or_group, given.value(), merge=False, force_add=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise _readable(error, overrides) from None
    except YAMLError as error:
        raise UserError(" ".join(str(error).split()), "files in configs/ are YAML", "correct the file") from None
    cfg = _onto_schema(composed, overrides)
    if cfg.rehearse:
        cfg.name += "-rehearsal"  # the run itself keeps its folder
    for source in cfg.corpus.sources.values():
        if source.format is not SourceFormat.hub or os.path.exists(source.path):
            source.path = _absolute(source.path)
    map_paths(cfg.corpus, _absolute)
    cfg.tokenizer.path = _absolute(cfg.tokenizer.path)
    cfg.cluster.scratch = os.path.abspath(cfg.cluster.scratch)
    check(cfg)
    return cfg


def run_dir(cfg: RunConfig) -> Path:
    """Folder of everything the run writes."""
    return Path(cfg.cluster.scratch) / "runs" / cfg.name


def freeze(cfg: RunConfig, path: Path) -> None:
    """Writes `cfg` so that `load` gives an equal object; the file is whole or it is not there."""
    beside = path.with_suffix(".tmp")
    beside.write_text(to_yaml(cfg), encoding="utf-8")
    os.replace(beside, path)


def load(path: Path) -> RunConfig:
    """Reads a frozen config; raises `UserError` where it does not fit the schema of this version."""
    if not path.is_file():
        repair = "start it with `marathon train` or `marathon run`"
        raise UserError(f"{path} is not there", "a run begins with a frozen config", repair)
    return _onto_schema(OmegaConf.load(path), [str(path)])


def to_yaml(cfg: object) -> str:
    """A config or one of its sections as YAML, keys in the order of the schema."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def config_hash(cfg: object) -> str:
    """sha256 of a config or of one of its sections, as hexadecimal digits."""
    return hashlib.sha256(to_yaml(cfg).encode()).hexdigest()


def diff(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by dotted name, each with its old and new value."""
    before, after = _flat(old), _flat(new)
    pairs = {k: (before.get(k), after.get(k)) for k in sorted(before.keys() | after.keys())}
    return {k: (was, now) for k, (was, now) in pairs.items() if was != now and not (was in NOTHING and now in NOTHING)}


def is_free_to_change(key: str) -> bool:
    """Whether a setting may change under the name of a run that has begun."""
    # Where the text stands may change, as on another machine; what it says is checked by the corpus hash.
    is_place = key.startswith(("corpus.sources.", "tokenizer.")) and key.endswith(".path")
    may_change = key.startswith(FREE_SECTIONS) and not key.startswith(FIXED)
    return is_place or key == "profile" or may_change


def settings_hash(cfg: RunConfig) -> str:
    """Hash of what may not change under a run's name, and of the tokens it trains on."""
    fixed = {k: v for k, v in _flat(cfg).items() if not is_free_to_change(k)}
    return hashlib.sha256(repr(sorted(fixed.items())).encode() + str(cfg.train.tokens).encode()).hexdigest()


def _toy_settings() -> list[str]:
    """What a rehearsal puts in the place of a recipe's own, as overrides that those given win over."""
    toy = safe_load((GROUPS / "rehearsal.yaml").read_text(encoding="utf-8"))
    return [f"{name}={value}" for name, value in toy.items()]


def _onto_schema(found: Any, given: list[str]) -> RunConfig:
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.to_container(found, resolve=True))
        if missing := sorted(OmegaConf.missing_keys(cfg)):
            repair = f"give them in YAML or on the command line: {missing[0]}=…"
            raise UserError(f"no value for {', '.join(missing)}", "these settings have no default", repair)
        return cast(RunConfig, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:
        raise _readable(error, given) from None


def _absolute(path: str) -> str:
    """A path that means the same from any folder; packaged files and empty strings stay."""
    if not path or path.startswith("package:"):
        return path
    return os.path.abspath(os.path.expanduser(path))


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, RunConfig):
        node = OmegaConf.to_container(OmegaConf.structured(node), enum_to_str=True)
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    return {k: v for name, value in node.items() for k, v in _flat(value, f"{prefix}{name}.").items()}


def _readable(error: Exception, overrides: list[str]) -> UserError:
    """Hydra's and OmegaConf's messages in the form value, rule, repair."""
    root: BaseException = error
    while isinstance(root.__cause__, Exception):
        root = root.__cause__
        if isinstance(root, UserError):
            return root
    text, given = str(error).strip(), " ".join(overrides) or "the defaults"
    if "must specify 'experiment'" in text:
        return UserError(f"no experiment in: {given}", "a run is described by one", _one_of("experiment"))
    if option := re.search(r"Could not find '(.+)/([^/']+)'", text):
        group, name = option.groups()
        return UserError(f"{group}={name}", f"must name a file configs/{group}/{name}.yaml", _one_of(group))
    if option := re.search(r"Could not override '([^']+)'|Key '([^']+)' not in '([^']+)'", text):
        name, section = option[1] or option[2], option[3] or "RunConfig"
        rule = f"{section} in {SCHEMA} has no such field"
        close = difflib.get_close_matches(name, setting_names(RunConfig), n=2, cutoff=0.5)
        repair = f"did you mean {' or '.join(close)}?" if close else f"the settings stand in {SCHEMA}"
        return UserError(f"unknown setting {name!r} in: {given}", rule, repair)
    first, *rest = [line.strip() for line in str(root).strip().splitlines()] or [type(error).__name__]
    where = next((line.removeprefix("full_key: ") for line in rest if line.startswith("full_key: ")), given)
    repair = f"a list, in brackets: {where.split('=')[0]}=[…]" if "not a ListConfig" in first else "correct the value"
    return UserError(f"{where}: {first}", f"the value must fit its field in {SCHEMA}", repair)


def _one_of(group: str) -> str:
    if files := groups().get(group):
        return f"{group}= one of {', '.join(path.stem for path in files)}"
    return f"the groups are {', '.join(groups())}"
