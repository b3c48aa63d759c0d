"""What can be chosen: groups and their files, settings and their values; for `marathon configs` and tab completion.

Reads file names and the schema's source; Hydra and OmegaConf stay out, since a key press waits for the answer.
"""

import ast
from pathlib import Path

from configs.errors import UserError

GROUPS = Path(__file__).resolve().parent.parent / "configs"

COMMANDS = (
    "run", "data", "train", "eval", "release",
    "plan", "doctor", "move", "report", "configs", "freeze", "completion",
)  # fmt: skip

SCRIPTS = {
    "bash": """_marathon() {
  local IFS=$'\\n' line=("${COMP_WORDS[@]:1:COMP_CWORD}")
  local word="${COMP_LINE:0:COMP_POINT}"; word="${word##* }"
  COMPREPLY=($(marathon _complete "${line[0]}" "$word"))
  # Readline breaks words at = and completes only what stands behind it.
  [[ $word == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}")
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -F _marathon marathon""",
    "zsh": """_marathon() {
  local -a found; found=(${(f)"$(marathon _complete "${words[2]}" "${words[CURRENT]}")"})
  compadd -S '' -- $found
}
compdef _marathon marathon""",
}


def list_choices() -> str:
    """Every group with a line for each of its files: name and first comment."""
    lines = []
    for group in sorted(_groups(), key=lambda g: (g != "experiment", g)):
        lines.append(group)
        lines += [f"  {path.stem:<14} {_first_comment(path)}" for path in sorted((GROUPS / group).glob("*.yaml"))]
    return "\n".join(lines)


def complete_words(words: list[str]) -> list[str]:
    """What may stand in place of the last of `words`, the command and the word begun."""
    command, begun = [*words, "", ""][:2]
    if command == "completion":
        return [shell for shell in SCRIPTS if shell.startswith(begun)]
    if len(words) < 2 or command == begun:
        return [name for name in COMMANDS if name.startswith(command)]
    group, equals, value = begun.partition("=")
    if equals and group in _groups():
        return [f"{group}={p.stem}" for p in sorted((GROUPS / group).glob("*.yaml")) if p.stem.startswith(value)]
    names = [f"{name}=" for name in (*_groups(), *_settings())]
    return sorted(name for name in names if name.startswith(begun))


def completion_script(shell: str) -> str:
    """The script for a shell; raises `UserError` for one that is not known."""
    if shell not in SCRIPTS:
        raise UserError(
            f"completion for {shell or 'no shell'}", f"the shells are {', '.join(SCRIPTS)}", "marathon completion bash"
        )
    return SCRIPTS[shell]


def _groups() -> list[str]:
    return sorted(p.name for p in GROUPS.iterdir() if p.is_dir() and any(p.glob("*.yaml")))


def _settings() -> list[str]:
    """Dotted names of all settings, read from the schema's sources."""
    sources = [(GROUPS / name).read_text(encoding="utf-8") for name in ("text.py", "schema.py")]
    tree = ast.parse("\n".join(sources))
    classes = {
        node.name: [
            (item.target.id, ast.unparse(item.annotation))
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        ]
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }

    def names(class_name: str, prefix: str) -> list[str]:
        found = []
        for name, annotation in classes[class_name]:
            nested = annotation in classes and annotation.endswith("Config")
            found += names(annotation, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
        return found

    return names("RunConfig", "")


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.removeprefix("#").strip()
    return ""
