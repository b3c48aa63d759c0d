"""The `marathon` command. Imports stay inside the functions: help answers at once, complete stages load no torch."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from configs.errors import UserError
from marathon import choices

Answer = int | str | Path  # of a command: its exit status, or what is printed
HELP = {"-h", "--help"}
STAGES = ("data", "train", "eval", "release")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status: 1 for what the user can mend, told in one message."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["help"]
    try:
        if name in ("help", *HELP):
            answer: Answer = choices.help_text(*rest[:1])
        elif name not in COMMANDS:
            known = ", ".join(n for n in COMMANDS if n[0] != "_")
            raise UserError(f"marathon {name}", f"the commands are {known}", "marathon --help")
        else:
            answer = choices.help_text(name) if HELP.intersection(rest) else COMMANDS[name](rest)
        if isinstance(answer, int):
            return answer
        print(answer)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output has gone, as in `marathon configs | head`; Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(stages: Sequence[str], overrides: list[str]) -> int:
    """Stages in order; only the first of all may find no run."""
    from marathon.stage import launch
    from marathon.stages import open_run

    cfg, run_dir = open_run(overrides, is_new=STAGES[0] in stages)
    for stage in stages:
        if status := launch(stage, cfg, run_dir):
            return status
    if stages == STAGES:
        from ledger.pages import render

        print(render(choices.HERE / "run.txt.j2", run_dir=run_dir).rstrip())
    return 0


def freeze(overrides: list[str]) -> Path:
    """Composes, checks, freezes; the folder is the last line printed."""
    from marathon.stages import open_run

    return open_run(overrides)[1]


def plan(overrides: list[str]) -> str:
    """The plan, and the mixture as far as it can be told."""
    from configs.compose import compose
    from marathon.layout import choose
    from marathon.plan import mixture_text, plan_text

    cfg, layout = choose(compose(overrides))
    print(plan_text(cfg), *layout, sep="\n")
    return mixture_text(cfg)


def doctor(overrides: list[str]) -> int:
    """Checks the machine, for an experiment if one is given."""
    from configs.compose import compose
    from marathon.doctor import print_checks, run_doctor

    return print_checks(run_doctor(compose(overrides) if overrides else None))


def move(arguments: list[str]) -> int:
    """Takes a run to another place."""
    from marathon.move import move as move_run

    match [word for a in arguments for word in (a.split("=", 1) if a.startswith("--to=") else [a])]:
        case [given, "--to", place] | ["--to", place, given]:
            move_run(given, place)
            return 0
    repair = "marathon move RUN --to FOLDER, or s3://BUCKET/FOLDER, or sftp://HOST/FOLDER"
    raise UserError(f"marathon move {' '.join(arguments)}", "what is moved and where to are given", repair)


def report(arguments: list[str]) -> Path:
    """Writes the page of a run, given by its name, as its folder, or as overrides."""
    from configs.compose import compose, run_dir
    from marathon.report import write_report

    first = arguments[0].removeprefix("run=") if len(arguments) == 1 else "="
    return write_report(run_dir(compose(arguments)) if "=" in first else choices.run_folder(first))


def data(arguments: list[str]) -> Answer:
    """Prepares the corpus; `data remove` takes documents out of it again."""
    if arguments[:1] != ["remove"]:
        return run(["data"], arguments)
    from data.removal import remove_documents
    from ledger.record import Ledger
    from marathon.stages import prepared_corpus

    given = _named(arguments[1:], "run", "ids", "reason")
    run_dir, ids = choices.run_folder(given["run"]), given["ids"].split(",")
    if given["ids"].startswith("@"):
        ids = Path(given["ids"][1:]).read_text(encoding="utf-8").splitlines()
    ids = sorted(filter(None, ids))
    if not (shards := remove_documents(prepared_corpus(run_dir)["path"], ids, given["reason"])):
        return "they have been removed before"
    Ledger(run_dir).append("documents_removed", reason=given["reason"], documents=len(ids), shards=shards)
    kept_out = "a corpus prepared anew has them again, unless a list of corpus.clean.opt_out.ids names them"
    return f"removed from {len(shards)} shards: {', '.join(shards)}\n{kept_out}"


def trace(arguments: list[str]) -> str:
    """A line for each document that a step, counted from 1, was trained on: source, language, id."""
    import numpy as np

    from configs.compose import load
    from data.loader import Samples
    from data.order import unskipped
    from marathon.stages import prepared_corpus
    from model.weights import list_checkpoints, read_manifest
    from train.progress import Progress

    given = _named(arguments, "run", "step")
    if not given["step"].isdigit():
        raise UserError(f"step={given['step']}", "a step is a number", "step=1 is the first")
    run_dir, step = choices.run_folder(given["run"]), int(given["step"])
    cfg, checkpoints = load(run_dir / "config.yaml"), list_checkpoints(run_dir)
    # The newest checkpoint knows the mixture of all steps before it.
    progress = Progress.from_json(read_manifest(checkpoints[-1])["progress"]) if checkpoints else Progress()
    if not 1 <= step <= progress.step:
        rule = f"its newest checkpoint is of step {progress.step}, and steps count from 1"
        repair = f"step=1 to step={progress.step}" if progress.step else "train it first"
        raise UserError(f"step={step} of {run_dir}", rule, repair)
    corpus_dir, (first, end) = prepared_corpus(run_dir)["path"], map(cfg.train.first_sample, (step - 1, step))
    samples = Samples(corpus_dir, progress.phases, cfg.train.seq_len, cfg.seed, cfg.mixture.packing)
    seen = samples.documents(unskipped(np.arange(first, end), progress.skipped))
    return "\n".join("\t".join((source, lang, name or "(removed)")) for source, lang, name in seen)


def thresholds(arguments: list[str]) -> str:
    """Derives quality thresholds from the documents of a config."""
    from configs.compose import compose
    from data.cleaning import derive_thresholds

    *overrides, path = arguments or [""]
    if not path.endswith(".yaml"):
        raise UserError(f"thresholds … {path}", "the last argument is the file to write", "… FILE.yaml")
    derive_thresholds(compose(overrides), Path(path), f"marathon thresholds {' '.join(arguments)}")
    return path


def _named(arguments: list[str], *names: str) -> dict[str, str]:
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if set(given) != set(names):
        rule = f"what is needed is {', '.join(f'{name}=…' for name in names)}, and nothing else"
        raise UserError(" ".join(arguments) or "no arguments", rule, "marathon help COMMAND shows an example")
    return given


COMMANDS: dict[str, Callable[[list[str]], Answer]] = {
    **{stage: partial(run, [stage]) for stage in STAGES},
    "run": partial(run, STAGES),
    **{command.__name__: command for command in (data, plan, doctor, trace, thresholds, move, report, freeze)},
    "configs": lambda _: choices.list_choices(),
    "completion": lambda arguments: choices.completion_script(arguments[0] if arguments else ""),
    "_complete": lambda words: "\n".join(choices.complete_words(words)),
}


if __name__ == "__main__":
    sys.exit(main())
