"""lm-evaluation-harness as a library: the one file that imports it.

What is asked comes from a suite folder (`eval/suites.py`) alone: lm-eval's own index of 13,000 tasks takes 15 s to
read, and its caches return answers of other checkpoints. No hub is reached. A prompt is `<bos>` + query + choice.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import PreTrainedModel, PreTrainedTokenizerBase

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # read when the libraries below are imported

from datasets import Dataset
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def run_suite(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, suite_dir: Path, tasks: list[str], *, batch_seqs: int
) -> dict[str, Any]:
    """Asks the model every question of `tasks`; all ranks take part and all return the same.

    Returns `{"tasks": {task: figures}, "prompt_sha256": hash of all prompts}` with these figures a task:

    - `acc`, `acc_bytes`: share of items whose right choice is the likeliest, as it is or a byte, each with `_stderr`;
    - `gold_bpb`: bits per byte of the right choices, a smoother curve than accuracy;
    - `items`, `chance` (accuracy of a blind guess), `ties` (items whose two likeliest choices are equal: a model that
      cannot tell choices apart; lm-eval then takes the first of them).

    Raises `ValueError` for a prompt that is longer than the model's context.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns once a task that its data come from memory
    questions = TaskManager(include_defaults=False).load([_task_config(suite_dir, task) for task in tasks])
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar a task
        # As in one process, on every rank: the ranks share the work inside `_SharedLM`.
        # Log-softmax in the dtype of a bf16 model would turn close answers into ties.
        lm = _SharedLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_seqs, softmax_dtype="float32")
        results: Any = evaluate(lm, questions, bootstrap_iters=1000)
    digest, figures = hashlib.sha256(), {}
    for task, samples in sorted(results["samples"].items()):
        digest.update(json.dumps([task, [sample["arguments"] for sample in samples]]).encode())
        figures[task] = _figures(results["results"][task], samples)
    return {"tasks": figures, "prompt_sha256": digest.hexdigest()}


class _SharedLM(HFLM):  # type: ignore[misc]
    """Scores every n-th request on each of n ranks, and gives all scores to all ranks; lm-eval believes to be alone.

    Its own way counts ranks within a node, and fails where a task has fewer documents than there are ranks.
    """

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a prompt with bos in front, or without where lm-eval adds it itself (`add_special_tokens=False`)."""
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        if len(ids) > self.max_length:  # with bos, but without the last one, which is only predicted
            raise ValueError(f"{string!r}: {len(ids)} tokens, the model reads {self.max_length}")
        return ids if add_special_tokens is False else [self.tokenizer.bos_token_id, *ids]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether it is the greedy one."""
        rank, n = PartialState().process_index, PartialState().num_processes
        scores = torch.zeros(len(requests), 2, dtype=torch.float64, device=self.device)
        if mine := requests[rank::n]:
            scores[rank::n] = scores.new_tensor(super().loglikelihood(mine, disable_tqdm=True))
        # Each row is zero on all ranks but one.
        return [(nats, bool(is_greedy)) for nats, is_greedy in reduce(scores, "sum").tolist()]


def _task_config(suite_dir: Path, task: str) -> dict[str, Any]:
    config = yaml.safe_load((suite_dir / f"{task}.yaml").read_text(encoding="utf-8"))
    lines = (suite_dir / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    # Through memory: `load_dataset` would have all ranks write the same files to a cache in the home folder.
    return {**config, "custom_dataset": lambda **_: {"test": Dataset.from_list([json.loads(line) for line in lines])}}


def _figures(metrics: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, float | int]:
    gold_bits, gold_bytes, ties = 0.0, 0, 0
    for sample in samples:
        nats, gold = [score for score, _ in sample["filtered_resps"]], sample["target"]
        gold_bits -= nats[gold] / math.log(2)
        gold_bytes += len(sample["doc"]["choices"][gold].encode())
        *_, second, best = sorted(nats)
        ties += best == second
    told = {name: metrics[f"{name},none"] for name in ("acc", "acc_stderr", "acc_bytes", "acc_bytes_stderr")}
    chance = 1 / len(samples[0]["doc"]["choices"])
    return {**told, "gold_bpb": gold_bits / gold_bytes, "items": len(samples), "chance": chance, "ties": ties}
