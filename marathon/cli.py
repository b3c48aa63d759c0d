"""The `marathon` command.

Imports stay inside the functions: `--help` and tab completion answer at once, and a stage that is complete is
skipped without loading torch.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from marathon import choices

if TYPE_CHECKING:
    from configs.schema import RunConfig

HELP = {"-h", "--help"}
STAGES = ("data", "train", "eval", "release")
"""In order."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 1 for what the user can mend, told in one message."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["help"]
    try:
        if name in ("help", *HELP):
            print(choices.help_text(*rest[:1]))
            return 0
        if name not in COMMANDS:
            known = ", ".join(n for n in COMMANDS if n[0] != "_")
            raise UserError(f"marathon {name}", f"the commands are {known}", "marathon --help")
        if HELP.intersection(rest):
            print(choices.help_text(name))
            return 0
        return COMMANDS[name](rest) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output has gone, as in `marathon configs | head`; Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(overrides: list[str]) -> int:
    """All stages in order."""
    cfg, run_dir = open_run(overrides)
    for stage in STAGES:
        if status := _run_stage(stage, cfg, run_dir):
            return status
    print(
        f"\nlook at\n"
        f"  {run_dir / 'report.html'}   the run on one page\n"
        f"  {run_dir / 'release'}   the model, ready for transformers\n"
        f"  {run_dir / 'eval'}   what every checkpoint knows\n"
        f"  {run_dir / 'ledger.jsonl'}   what was done, line by line"
    )
    return 0


def one_stage(stage: str, overrides: list[str]) -> int:
    """One stage; only the first may find no run."""
    return _run_stage(stage, *open_run(overrides, is_new=stage == STAGES[0]))


def _run_stage(stage: str, cfg: "RunConfig", run_dir: Path) -> int:
    from marathon.launch import launch
    from marathon.stages import inputs_of, is_done

    if is_done(stage, inputs_of(stage, cfg, run_dir), run_dir):
        print(f"{stage}: complete, skipped")
        return 0
    return launch(stage, cfg, run_dir)


def plan(overrides: list[str]) -> None:
    """Prints the plan."""
    from configs.compose import compose
    from marathon.plan import mixture_text, plan_text

    cfg = compose(overrides)
    print(plan_text(cfg))
    print(mixture_text(cfg))


def doctor(overrides: list[str]) -> int:
    """Checks the machine, for an experiment if one is given."""
    from configs.compose import compose
    from marathon.doctor import print_checks, run_doctor

    return print_checks(run_doctor(compose(overrides) if overrides else None))


def move(arguments: list[str]) -> None:
    """Takes a run to another place."""
    from marathon.move import move as move_run

    match [word for a in arguments for word in (a.split("=", 1) if a.startswith("--to=") else [a])]:
        case [given, "--to", place] | ["--to", place, given]:
            move_run(given, place)
        case _:
            raise UserError(
                f"marathon move {' '.join(arguments)}",
                "what is moved and where to are given",
                "marathon move RUN --to FOLDER, or s3://BUCKET/FOLDER, or sftp://HOST/FOLDER",
            )


def report(arguments: list[str]) -> None:
    """Writes the page of a run, given by its name, as its folder, or as overrides."""
    from configs.compose import compose, run_dir
    from marathon.report import write_report

    is_run = len(arguments) == 1 and "=" not in arguments[0]
    print(write_report(choices.run_folder(arguments[0]) if is_run else run_dir(compose(arguments))))


def configs(_: list[str]) -> None:
    """Lists every group with a line for each choice."""
    print(choices.list_choices())


def data(arguments: list[str]) -> int:
    """Prepares the corpus; `data remove` takes documents out of it again."""
    if arguments[:1] != ["remove"]:
        return one_stage("data", arguments)
    from marathon.trace import remove

    given = _named(arguments[1:], "run", "ids", "reason")
    named = Path(given["ids"].removeprefix("@"))
    ids = named.read_text(encoding="utf-8").splitlines() if given["ids"].startswith("@") else given["ids"].split(",")
    shards = remove(choices.run_folder(given["run"]), [doc_id for doc_id in ids if doc_id], given["reason"])
    print(f"removed from {len(shards)} shards: {', '.join(shards)}\nin corpus.clean.opt_out.ids they stay out for ever")
    return 0


def trace(arguments: list[str]) -> None:
    """Prints which documents a step was trained on."""
    from marathon.trace import trace as documents_of

    given = _named(arguments, "run", "step")
    if not given["step"].isdigit():
        raise UserError(f"step={given['step']}", "a step is a number", "step=1 is the first")
    print("\n".join(documents_of(choices.run_folder(given["run"]), int(given["step"]))))


def thresholds(arguments: list[str]) -> None:
    """Derives quality thresholds from the documents of a config."""
    from configs.compose import compose
    from data.cleaning import derive_thresholds

    *overrides, path = arguments or [""]
    if not path.endswith(".yaml"):
        raise UserError(f"thresholds … {path}", "the last argument is the file to write", "… FILE.yaml")
    derive_thresholds(compose(overrides), Path(path), f"marathon thresholds {' '.join(arguments)}")
    print(path)


def _named(arguments: list[str], *names: str) -> dict[str, str]:
    """The values of NAME=VALUE arguments, each of which is needed."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if set(given) != set(names):
        raise UserError(
            " ".join(arguments) or "no arguments",
            f"what is needed is {', '.join(f'{name}=…' for name in names)}, and nothing else",
            "marathon help COMMAND shows an example",
        )
    return given


def freeze(overrides: list[str]) -> None:
    """Composes, checks, freezes; the folder is the last line printed."""
    print(open_run(overrides)[1])


def completion(arguments: list[str]) -> None:
    """Prints the shell's completion script."""
    print(choices.completion_script(arguments[0] if arguments else ""))


def complete(words: list[str]) -> None:
    """Prints what may follow; called by the completion script."""
    print("\n".join(choices.complete_words(words)))


def open_run(overrides: list[str], is_new: bool = True) -> tuple["RunConfig", Path]:
    """Composes the config and freezes it into the run's folder, which is made if the run may be new.

    Raises:
        UserError: the run has checkpoints and a setting that decides what they are has changed; or it is not
            there, and what is asked takes one.
    """
    from configs.compose import compose, config_hash, diff, freeze, is_free_to_change, load, run_dir
    from eval.suites import require_families
    from ledger import host
    from ledger.record import Ledger
    from marathon.stages import moved_to
    from train.faults import refuse_if_held

    cfg = compose(overrides)
    require_families(cfg.suite)
    folder = run_dir(cfg)
    frozen = folder / "config.yaml"
    if not is_new and not frozen.exists():
        raise UserError(
            f"no run {cfg.name} in {folder.parent}; there: {', '.join(choices.run_names(folder.parent)) or 'none'}",
            "training, evaluation and release go on from what `marathon data` prepares",
            "run `marathon data` with the same arguments, or `marathon run` for all stages",
        )
    _make_folder(folder)
    changes = diff(load(frozen), cfg) if frozen.exists() else {}
    told = {key: f"{key}: {old} -> {new}" for key, (old, new) in changes.items()}
    fixed = [line for key, line in told.items() if not is_free_to_change(key)]
    if fixed and any((folder / "checkpoints").glob("step-*")):
        first = "; ".join(fixed[:6] + ([f"and {len(fixed) - 6} more"] if len(fixed) > 6 else []))
        raise UserError(
            f"run {cfg.name} has checkpoints, and these settings differ from theirs: {first}",
            "what decides weights and order of samples stays as the run began",
            f"name={cfg.name}-2 for a new run, or leave them as they were",
        )
    if place := moved_to(folder):
        print(f"warning: run {cfg.name} was moved to {place}; what is done here stays here", file=sys.stderr)
    if frozen.exists() and not changes:
        return cfg, folder
    refuse_if_held(folder)
    freeze(cfg, frozen)
    facts: dict[str, Any] = {"arguments": overrides, "config_hash": config_hash(cfg)}
    if changes:
        print(*told.values(), sep="\n")
        facts["settings"] = {key: [str(old), str(new)] for key, (old, new) in changes.items()}
    event = "changed" if changes else "frozen"
    Ledger(folder).append(event, **facts, software=host.software(), commit=host.commit())
    return cfg, folder


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}",
            "everything a run writes stands under cluster.scratch",
            "export MARATHON_SCRATCH=<a folder of yours>, or cluster.scratch=…",
        ) from None


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "data": data,
    **{stage: partial(one_stage, stage) for stage in STAGES[1:]},
    **{command.__name__: command for command in (run, plan, doctor, trace, thresholds, move, report, configs)},
    **{command.__name__: command for command in (freeze, completion)},
    "_complete": complete,
}
"""By name; commands.yaml tells of each."""


if __name__ == "__main__":
    sys.exit(main())
