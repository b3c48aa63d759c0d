import copy
import json
import math
import socket
from pathlib import Path

import datasets
import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import Qwen3Config, Qwen3ForCausalLM

from configs.schema import SuiteConfig
from eval.harness import run_suite
from eval.suites import build_suite

TASKS = ["agreement_mt", "agreement_pl", "countries_de", "countries_el"]


def build_model(seed: int, **changes) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        **{
            "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
            **changes,
        }
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return build_model(0)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    config = SuiteConfig(tasks=["agreement", "countries"], max_items_per_language=10)
    return build_suite(config, ["de", "el", "mt", "pl"], tmp_path_factory.mktemp("suites"))


@pytest.fixture(scope="module")
def result(model, tokenizer, suite) -> dict:
    return run_suite(model, tokenizer, suite, TASKS, batch_seqs=8)


def items_of(suite: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (suite / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def nats_by_hand(model, tokenizer, query: str, choice: str) -> float:
    """log P(choice | <s> query) in float64, one sequence, no padding."""
    context = [tokenizer.bos_token_id, *tokenizer.encode(query, add_special_tokens=False)]
    tokens = [*context, *tokenizer.encode(choice, add_special_tokens=False)]
    assert tokens[1:] == tokenizer.encode(query + choice, add_special_tokens=False)
    log_p = torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)
    return sum(float(log_p[i - 1, tokens[i]]) for i in range(len(context), len(tokens)))


@pytest.mark.parametrize("task", ["agreement_mt", "countries_el"])
def test_figures_are_those_computed_by_hand(task, model, tokenizer, suite, result):
    exact = copy.deepcopy(model).double()
    right = right_by_bytes = bits = n_bytes = 0
    items = items_of(suite, task)
    for item in items:
        nats = [nats_by_hand(exact, tokenizer, item["query"], choice) for choice in item["choices"]]
        sizes = [len(choice.encode()) for choice in item["choices"]]
        per_byte = [value / size for value, size in zip(nats, sizes, strict=True)]
        right += nats.index(max(nats)) == item["gold"]
        right_by_bytes += per_byte.index(max(per_byte)) == item["gold"]
        bits -= nats[item["gold"]] / math.log(2)
        n_bytes += sizes[item["gold"]]
    found, n = result["tasks"][task], len(items)
    assert found["items"] == n
    assert found["acc"] == pytest.approx(right / n)
    assert found["acc_bytes"] == pytest.approx(right_by_bytes / n)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(right / n * (1 - right / n) / (n - 1)))
    assert found["gold_bpb"] == pytest.approx(bits / n_bytes, rel=1e-5)
    assert found["chance"] == 1 / len(items[0]["choices"])
    assert found["ties"] == 0


@pytest.mark.parametrize("template", ["$A", "<s> $A </s>"])
def test_prompts_begin_with_one_bos_whatever_the_tokenizer_adds(template, tokenizer_adding, model, suite, result):
    assert run_suite(model, tokenizer_adding(template), suite, TASKS, batch_seqs=8) == result


def test_suite_folder_alone_gives_the_same_to_lm_eval(model, tokenizer, suite, result, tmp_path, monkeypatch):
    monkeypatch.chdir(suite)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    questions = TaskManager(include_path=str(suite), include_defaults=False).load(["agreement", "countries_de"])
    plain = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), questions, log_samples=False)["results"]
    assert plain.keys() >= {"agreement_mt", "agreement_pl", "agreement_de", "countries_de"}
    for task in plain.keys() & set(TASKS):
        for metric in ("acc", "acc_bytes"):
            assert plain[task][f"{metric},none"] == pytest.approx(result["tasks"][task][metric])


def test_batch_size_does_not_matter(model, tokenizer, suite, result):
    alone = run_suite(model, tokenizer, suite, TASKS, batch_seqs=1)
    assert alone["prompt_sha256"] == result["prompt_sha256"]
    for task in TASKS:
        assert alone["tasks"][task] == pytest.approx(result["tasks"][task], rel=1e-5)


def test_another_checkpoint_has_its_own_result_and_another_prompt_its_own_hash(tokenizer, suite, result):
    other = run_suite(build_model(1), tokenizer, suite, TASKS, batch_seqs=8)
    assert other["prompt_sha256"] == result["prompt_sha256"]
    for task in TASKS:
        assert other["tasks"][task]["gold_bpb"] != pytest.approx(result["tasks"][task]["gold_bpb"], rel=1e-3)
    fewer = run_suite(build_model(1), tokenizer, suite, TASKS[:2], batch_seqs=8)
    assert fewer["prompt_sha256"] != result["prompt_sha256"]
    for task in TASKS[:2]:
        assert fewer["tasks"][task] == pytest.approx(other["tasks"][task], rel=1e-5)


def test_model_that_knows_nothing_shows_as_ties(tokenizer, suite):
    constant = build_model(0, tie_word_embeddings=False)
    constant.lm_head.weight.data.zero_()
    found = run_suite(constant, tokenizer, suite, ["agreement_pl", "countries_de"], batch_seqs=8)["tasks"]
    for task, figures in found.items():
        ties = 0
        for item in items_of(suite, task):
            # Each token costs the same, so choices differ by their number of tokens alone.
            first, second, *_ = sorted(len(tokenizer.encode(c, add_special_tokens=False)) for c in item["choices"])
            ties += first == second
        assert figures["ties"] == ties > 0


def test_bf16_models_are_not_scored_in_bf16(model, tokenizer, suite, result):
    found = run_suite(copy.deepcopy(model).bfloat16(), tokenizer, suite, TASKS, batch_seqs=8)["tasks"]
    for task in TASKS:
        assert found[task]["gold_bpb"] == pytest.approx(result["tasks"][task]["gold_bpb"], rel=0.02)
        assert found[task]["ties"] == 0


def test_nothing_is_asked_of_the_network(model, tokenizer, suite, result, monkeypatch):
    def refuse(*address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run_suite(model, tokenizer, suite, TASKS, batch_seqs=8) == result


def test_prompt_longer_than_the_context_is_refused(tokenizer, suite):
    with pytest.raises(ValueError, match="the model reads 8"):
        run_suite(build_model(0, max_position_embeddings=8), tokenizer, suite, TASKS, batch_seqs=8)
