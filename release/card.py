"""The model card: a rendering of the ledger, the corpus manifest and the evaluations.

What nobody recorded stands there as GAP with its reason: an empty cell would read as "none".
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from eval.results import read_results
from ledger.record import Ledger, gap


def write_card(cfg: RunConfig, run_dir: Path, checkpoint_sha256: str, folder: Path) -> None:
    """Writes README.md with its YAML head into a release folder."""
    ledger = Ledger(run_dir)
    facts = {
        event: ledger.last(event) or {} for event in ("frozen", "corpus", "train_start", "train_end", "checkpoint")
    }
    evaluation = _last_evaluation(run_dir)
    parts = [
        _head(cfg, facts),
        f"# {cfg.name}",
        _summary(cfg, facts),
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."\ntokenizer = AutoTokenizer.from_pretrained(folder)\n'
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        'prompt = tokenizer("1. ", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0], skip_special_tokens=True))\n```\n\n"
        "A base model: it continues text. It has not been trained to follow instructions or to refuse any.",
        _data(facts),
        _training(cfg, facts, checkpoint_sha256),
        _results(evaluation),
        "## Integrity\n\n`SHA256SUMS` holds the hash of every file. `verified.json` holds the figures of loading this "
        "folder with transformers in a fresh process and comparing token ids, logits and greedy continuations with "
        "the trainer's own.",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _head(cfg: RunConfig, facts: dict[str, dict[str, Any]]) -> str:
    languages = sorted(facts["corpus"].get("languages", {}))
    return "\n".join(
        [
            "---",
            "language:",
            *(f"- {language}" for language in languages),
            *([f"license: {cfg.release.licence}"] if cfg.release.licence else []),
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            "- marathon",
            "- multilingual",
            "---",
        ]
    )


def _summary(cfg: RunConfig, facts: dict[str, dict[str, Any]]) -> str:
    parameters = facts["train_start"].get("parameters")
    tokens = facts["train_end"].get("tokens")
    rows = [
        ("provider", cfg.release.provider or gap("release.provider was not given")),
        ("licence of the weights", cfg.release.licence or gap("release.licence was not given")),
        ("parameters", f"{parameters:,}" if parameters else gap("the ledger has no start of a training")),
        ("architecture", "decoder: RMSNorm, RoPE, grouped queries, QK-norm, SwiGLU (`Qwen3ForCausalLM`)"),
        ("context length", f"{cfg.train.seq_len:,} tokens"),
        ("tokens trained on", f"{tokens:,}, repetitions counted" if tokens else gap("the training has not ended")),
        ("languages", ", ".join(sorted(facts["corpus"].get("languages", {}))) or gap("no corpus in the ledger")),
        ("intended use, limitations", gap("to be written by the provider")),
    ]
    return _table(("", ""), rows)


def _data(facts: dict[str, dict[str, Any]]) -> str:
    corpus = facts["corpus"]
    consumed = facts["checkpoint"].get("consumed") or {}
    sources = [
        (name, source["licence"], source["origin"], f"{source['documents']:,}", f"{source['tokens']:,}")
        for name, source in corpus.get("sources", {}).items()
    ]
    languages = [
        (language, f"{entry['documents']:,}", f"{entry['tokens']:,}", f"{consumed.get(language, 0):,}")
        for language, entry in sorted(corpus.get("languages", {}).items())
    ]
    return "\n\n".join(
        [
            "## Training data",
            f"Corpus `{corpus.get('corpus_hash', gap('no corpus in the ledger'))}`.",
            _table(("source", "licence", "origin", "documents", "tokens"), sources),
            _table(("language", "documents", "tokens in the corpus", "tokens trained on"), languages),
            f"Opt-outs honoured, personal data, illegal content: {gap('no such step has run on this corpus')}.",
        ]
    )


def _training(cfg: RunConfig, facts: dict[str, dict[str, Any]], checkpoint_sha256: str) -> str:
    start, end = facts["train_start"], facts["train_end"]
    software = ", ".join(f"{name} {version}" for name, version in start.get("software", {}).items())
    rows = [
        ("checkpoint", f"`{facts['checkpoint'].get('name', '')}`, sha256 `{checkpoint_sha256}`"),
        ("order of samples", f"hash `{end.get('order_hash', gap('not recorded'))}`, seed {cfg.seed}"),
        (
            "optimizer",
            f"AdamW, peak rate {cfg.optim.lr:g}, {cfg.schedule.name.value}, "
            f"{cfg.train.tokens_per_step:,} tokens a step",
        ),
        ("precision", f"{cfg.engine.precision.value}, gradients accumulated in fp32, ZeRO-{cfg.engine.zero_stage}"),
        ("processes", f"{start.get('world_size', '?')}, each on {start.get('device', gap('not recorded'))}"),
        ("operations", f"{end['flops']:.3g} FLOPs" if "flops" in end else gap("the training has not ended")),
        ("device-hours", f"{end['device_hours']:.3g}" if "device_hours" in end else gap("the training has not ended")),
        ("energy", str(end.get("energy_kwh", gap("not recorded")))),
        ("software", software or gap("not recorded")),
        ("code", f"commit `{start.get('commit', gap('not recorded'))}`"),
        ("container", str(start.get("container", gap("not recorded")))),
    ]
    return "## Training\n\n" + _table(("", ""), rows)


def _results(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return f"## Evaluation\n\n{gap('`marathon eval` has not run')}"
    languages = [
        (language, f"{entry['bpb']:.3f}", f"{entry['low']:.3f} to {entry['high']:.3f}", str(entry["documents"]))
        for language, entry in sorted(evaluation["bpb"].items())
    ]
    tasks = [
        (name, f"{task['acc']:.3f}", f"{task['acc_stderr']:.3f}", f"{task['chance']:.2f}", str(task["items"]))
        for name, task in sorted(evaluation["tasks"].items())
    ]
    return "\n\n".join(
        [
            "## Evaluation",
            f"Bits per byte on held-out documents, window {evaluation['window']} tokens, with 95 % intervals of a "
            "bootstrap over documents. Lower is better. Between languages they mean little: letters differ in bytes.",
            _table(("language", "bits per byte", "95 % interval", "documents"), languages),
            "Tasks, zero-shot, by log-likelihood, generated from CLDR. `agreement`: which form of a unit follows a "
            "number; each pair is asked in both directions, so a model that does not look at the number scores one "
            "half. `countries`: the name of a country in the language, out of four. Hungarian has no agreement.",
            _table(("task", "accuracy", "standard error", "chance", "items"), tasks)
            if tasks
            else gap("none was asked"),
        ]
    )


def _last_evaluation(run_dir: Path) -> dict[str, Any] | None:
    results = read_results(run_dir)
    return results[-1] if results else None


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
