"""The `marathon` command.

Imports stay inside the functions: `--help` and tab completion answer at once, and a stage that is complete is
skipped without loading torch.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import UserError

if TYPE_CHECKING:
    from configs.schema import RunConfig

USAGE = """Marathon: from multilingual European text to a released model.

usage: marathon COMMAND [experiment=NAME] [SETTING=VALUE ...]

stages, each restartable and skipped when complete
  run      all four, one after the other
  data     text to tokenizer, shards and manifest
  train    train, validate, write checkpoints; resumes by itself
  eval     ask every checkpoint: bits per byte by language, tasks
  release  export the last checkpoint as a Hugging Face folder and verify it

beside them
  plan     what a run needs: parameters, FLOPs, memory, tokens, steps
  doctor   whether this machine is ready for it
  move     RUN --to FOLDER_OR_URL: take a run to another machine, by folder, sftp:// or s3://
  report   one offline HTML page of the run: loss, languages, mixture, throughput
  configs  the experiments, models, clusters and other groups there are
  freeze   compose and check once, print the run's folder; job scripts do this
  completion bash|zsh   tab completion: eval "$(marathon completion bash)"

example: marathon train experiment=smoke optim.lr=1e-3
settings and their meaning: configs/schema.py; values: configs/*/*.yaml"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 1 for what the user can mend, told in one message."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    name, rest = given[0], given[1:]
    try:
        if name not in COMMANDS:
            raise UserError(
                f"marathon {name}",
                f"the commands are {', '.join(n for n in COMMANDS if n[0] != '_')}",
                "marathon --help",
            )
        if rest and rest[0] in ("-h", "--help"):
            print(USAGE)
            return 0
        return COMMANDS[name](rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output has gone, as in `marathon configs | head`; Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(overrides: list[str]) -> int:
    """All stages in order."""
    from marathon.stages import STAGES

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


def _one_stage(stage: str) -> Callable[[list[str]], int]:
    return lambda overrides: _run_stage(stage, *open_run(overrides, is_new=stage == "data"))


def _run_stage(stage: str, cfg: "RunConfig", run_dir: Path) -> int:
    from marathon.launch import launch
    from marathon.stages import inputs_of, is_done

    if is_done(stage, inputs_of(stage, cfg, run_dir), run_dir):
        print(f"{stage}: complete, skipped")
        return 0
    return launch(stage, cfg, run_dir)


def plan(overrides: list[str]) -> int:
    """Prints the plan."""
    from configs.compose import compose
    from marathon.plan import plan_text

    print(plan_text(compose(overrides)))
    return 0


def doctor(overrides: list[str]) -> int:
    """Checks the machine, for an experiment if one is given."""
    from configs.compose import compose
    from marathon.doctor import print_checks, run_doctor

    return print_checks(run_doctor(compose(overrides) if overrides else None))


def move(arguments: list[str]) -> int:
    """Takes a run to another place."""
    from marathon.move import move as move_run

    if len(arguments) == 2 and arguments[1].startswith("--to="):
        arguments = [arguments[0], *arguments[1].split("=", 1)]
    if len(arguments) != 3 or arguments[1] != "--to":
        raise UserError(
            f"marathon move {' '.join(arguments)}",
            "what is moved and where to are given",
            "marathon move RUN --to FOLDER, or s3://BUCKET/FOLDER, or sftp://HOST/FOLDER",
        )
    move_run(arguments[0], arguments[2])
    return 0


def report(arguments: list[str]) -> int:
    """Writes the page of a run, given as its folder or as overrides."""
    from configs.compose import compose, run_dir
    from marathon.report import write_report

    is_folder = len(arguments) == 1 and Path(arguments[0]).is_dir()
    print(write_report(Path(arguments[0]) if is_folder else run_dir(compose(arguments))))
    return 0


def configs(_: list[str]) -> int:
    """Lists every group with a line for each choice."""
    from marathon.choices import list_choices

    print(list_choices())
    return 0


def freeze(overrides: list[str]) -> int:
    """Composes, checks, freezes; the folder is the last line printed."""
    print(open_run(overrides)[1])
    return 0


def completion(arguments: list[str]) -> int:
    """Prints the shell's completion script."""
    from marathon.choices import completion_script

    print(completion_script(arguments[0] if arguments else ""))
    return 0


def complete(words: list[str]) -> int:
    """Prints what may follow; called by the completion script."""
    from marathon.choices import complete_words

    print("\n".join(complete_words(words)))
    return 0


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
        there = ", ".join(sorted(p.name for p in folder.parent.glob("*"))) or "none"
        raise UserError(
            f"no run {cfg.name} in {folder.parent}; there: {there}",
            "training, evaluation and release go on from what `marathon data` prepares",
            "run `marathon data` with the same arguments, or `marathon run` for all stages",
        )
    _make_folder(folder)
    changes = diff(load(frozen), cfg) if frozen.exists() else {}
    fixed = {key: change for key, change in changes.items() if not is_free_to_change(key)}
    if fixed and any((folder / "checkpoints").glob("step-*")):
        told = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in list(fixed.items())[:6])
        told += f"; and {len(fixed) - 6} more" if len(fixed) > 6 else ""
        raise UserError(
            f"run {cfg.name} has checkpoints, and these settings differ from theirs: {told}",
            "what decides weights and order of samples stays as the run began",
            f"name={cfg.name}-2 for a new run, or leave them as they were",
        )
    if place := moved_to(folder):
        print(f"warning: run {cfg.name} was moved to {place}; what is done here stays here", file=sys.stderr)
    if frozen.exists() and not changes:
        return cfg, folder
    refuse_if_held(folder)
    freeze(cfg, frozen)
    facts = {"config_hash": config_hash(cfg), "software": host.software(), "commit": host.commit()}
    if changes:
        for key, (old, new) in changes.items():
            print(f"{key}: {old} -> {new}")
        Ledger(folder).append("changed", settings={k: [str(o), str(n)] for k, (o, n) in changes.items()}, **facts)
    else:
        Ledger(folder).append("frozen", **facts)
    return cfg, folder


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}",
            "everything a run writes stands under cluster.scratch",
            "export MARATHON_SCRATCH=<a folder of yours>, or cluster.scratch=…",
        ) from None


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "data": _one_stage("data"),
    "train": _one_stage("train"),
    "eval": _one_stage("eval"),
    "release": _one_stage("release"),
    "plan": plan,
    "doctor": doctor,
    "move": move,
    "report": report,
    "configs": configs,
    "freeze": freeze,
    "completion": completion,
    "_complete": complete,
}


if __name__ == "__main__":
    sys.exit(main())
