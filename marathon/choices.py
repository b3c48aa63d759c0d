"""What can be chosen, for help, `configs` and tab completion, where a key press waits: Hydra stays out."""

import os
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError
from configs.rules import groups, setting_names

HERE = Path(__file__).resolve().parent


def sections() -> dict[str, dict[str, dict[str, Any]]]:
    """By heading, the commands: what is told of each and what completes its words."""
    return yaml.safe_load((HERE / "commands.yaml").read_text(encoding="utf-8"))


def commands() -> dict[str, dict[str, Any]]:
    """All commands by name."""
    return {name: {**entry, "name": name} for section in sections().values() for name, entry in section.items()}


def help_text(command: str = "") -> str:
    """What a command does, what it takes and an example; or all commands with a line each."""
    from ledger.pages import render

    return render(HERE / "help.txt.j2", sections=sections(), command=commands().get(command)).rstrip()


def list_choices() -> str:
    """Every group with a line for each of its files: name and first comment."""
    lines = []
    for group, files in sorted(groups().items(), key=lambda item: (item[0] != "experiment", item[0])):
        lines.append(group)
        for path in files:
            comments = (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
            told = next((line.removeprefix("#").strip() for line in comments if "@package" not in line), "")
            lines.append(f"  {path.stem:<14} {told}")
    return "\n".join(lines)


def complete_words(words: list[str]) -> list[str]:
    """What may stand in place of the last of `words`, which are the command and what follows it."""
    *earlier, begun = words or [""]
    kinds = [" ".join(commands())]
    if earlier:
        kinds = commands().get(earlier[0], {"words": [[]]})["words"][: len(earlier)][-1]
    for kind in kinds:
        offered = run_names() if kind == "RUN" else _settings_like(begun) if kind == "SETTING" else kind.split()
        if fitting := [word for word in offered if word.startswith(begun)]:
            return sorted(fitting)
    return []


def completion_script(shell: str) -> str:
    """The script for a shell; raises `UserError` for one that is not known."""
    scripts = {path.suffix[1:]: path for path in sorted(HERE.glob("completion.*"))}
    if shell not in scripts:
        known = f"the shells are {', '.join(scripts)}"
        raise UserError(f"completion for {shell or 'no shell'}", known, "marathon completion bash")
    return scripts[shell].read_text(encoding="utf-8")


def run_names(runs: Path | None = None) -> list[str]:
    """Names of the runs in a folder, by default that of the scratch folder."""
    return sorted(path.parent.name for path in (runs or _runs()).glob("*/config.yaml"))


def run_folder(given: str) -> Path:
    """The folder that a run's name under the scratch folder means, or a path to it."""
    by_name = _runs() / given
    return by_name if by_name.is_dir() or not os.path.isdir(given) else Path(given)


def _runs() -> Path:
    return Path(os.environ.get("MARATHON_SCRATCH", "scratch")) / "runs"


def _settings_like(begun: str) -> list[str]:
    files, (group, equals, _) = groups(), begun.partition("=")
    if equals and group in files:
        return [f"{group}={path.stem}" for path in files[group]]
    from configs.schema import RunConfig

    return [f"{name}=" for name in (*files, *setting_names(RunConfig))]
