import hashlib
import json
import os
import socket
from pathlib import Path

import pytest
import torch.multiprocessing
from safetensors.torch import save_file

from configs.compose import compose
from configs.errors import UserError
from configs.schema import ModelConfig, RunConfig
from eval.results import read_results, write_result
from eval.run import evaluate
from ledger.record import Ledger
from model.decoder import Decoder, init_weights
from model.weights import manifest_sha256


@pytest.fixture
def cfg(tiny_model: ModelConfig, tmp_path: Path) -> RunConfig:
    cfg = compose(["experiment=smoke", f"cluster.scratch={tmp_path}"])
    cfg.model = tiny_model
    cfg.train.seq_len = 128
    cfg.suite.max_items_per_language = 10
    return cfg


@pytest.fixture
def tokenizer_dir(tokenizer, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def run_dir(cfg: RunConfig, tmp_path: Path) -> Path:
    for step in (0, 60):
        save_checkpoint(cfg, tmp_path / "run", step, seed=step)
    return tmp_path / "run"


def save_checkpoint(cfg: RunConfig, run_dir: Path, step: int, seed: int) -> None:
    decoder = Decoder(cfg.model, 384)
    init_weights(decoder, seed)
    folder = run_dir / "checkpoints" / f"step-{step:09}"
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(decoder.named_parameters())
    save_file({f"master/{n}/0": p.detach().flatten() for n, p in names.items()}, folder / "rank-00000.safetensors")
    file = {
        "sha256": hashlib.sha256((folder / "rank-00000.safetensors").read_bytes()).hexdigest(),
        "fragments": [[name, 0, parameter.numel()] for name, parameter in names.items()],
    }
    manifest = {
        "vocab_rows": 384,
        "progress": {"step": step, "tokens": step * 8192},
        "files": {"rank-00000.safetensors": file},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "manifest.sha256").write_bytes(manifest_sha256((folder / "manifest.json").read_bytes()))


def as_one_of_two(rank: int, port: int, cfg: RunConfig, run_dir: Path, material: dict) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    evaluate(cfg, run_dir, **material)


def test_run_of_two_processes_equals_that_of_one(cfg, run_dir, tmp_path, documents, tokenizer_dir, capsys):
    material = {"documents": documents, "tokenizer_dir": tokenizer_dir, "corpus_hash": "c0"}
    two = tmp_path / "two"
    (two / "checkpoints").mkdir(parents=True)
    (two / "checkpoints" / "step-000000060").symlink_to(run_dir / "checkpoints" / "step-000000060")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(as_one_of_two, (port, cfg, two, material), nprocs=2)
    evaluate(cfg, run_dir, **material)

    untrained, alone = read_results(run_dir)
    (together,) = read_results(two)
    assert (untrained["step"], alone["step"], together["step"]) == (0, 60, 60)
    assert untrained["bpb_mean"] != alone["bpb_mean"]
    assert (alone["world_size"], together["world_size"]) == (1, 2)
    for key in ("model_sha256", "suite_hash", "corpus_hash", "prompt_sha256", "window", "precision", "tokens"):
        assert alone[key] == together[key], key
    assert alone["bpb_mean"] == pytest.approx(together["bpb_mean"], rel=1e-6)
    for part in ("bpb", "tasks", "families"):
        assert alone[part].keys() == together[part].keys()
        for name, figures in alone[part].items():
            assert together[part][name] == pytest.approx(figures, rel=1e-6), name
    assert alone["bpb"].keys() == {"de", "el", "pl"}
    assert alone["tasks"].keys() == {f"{f}_{lang}" for f in ("agreement", "countries") for lang in ("de", "el", "pl")}
    assert [record["checkpoint"] for record in Ledger(two).read("evaluation")] == ["step-000000060"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 of 2 checkpoints to evaluate"
    assert "step-000000060" in lines[-1] and len(lines) == 3


def test_only_what_has_changed_is_evaluated_again(cfg, run_dir, documents, tokenizer_dir):
    material = {"documents": documents[:2], "tokenizer_dir": tokenizer_dir}
    cfg.suite.tasks = ["countries"]

    def written() -> dict[str, int]:
        evaluate(cfg, run_dir, corpus_hash=corpus_hash, **material)
        return {path.stem[-2:]: path.stat().st_mtime_ns for path in (run_dir / "eval").glob("*.json")}

    corpus_hash = "c0"
    first = written()
    assert written() == first
    assert len(list(Ledger(run_dir).read("evaluation"))) == 2

    save_checkpoint(cfg, run_dir, 60, seed=7)
    other_weights = written()
    assert other_weights["00"] == first["00"] and other_weights["60"] != first["60"]

    corpus_hash = "c1"
    other_documents = written()
    assert all(other_documents[step] != other_weights[step] for step in ("00", "60"))
    assert len(list((run_dir / "eval" / "earlier").iterdir())) == 3, "nothing that was measured is lost"

    cfg.suite.max_items_per_language = 12
    other_questions = written()
    assert all(other_questions[step] != other_documents[step] for step in ("00", "60"))

    (run_dir / "ledger.jsonl").unlink()  # as if a kill had come between a result and its line
    assert written() == other_questions
    assert len(list(Ledger(run_dir).read("evaluation"))) == 2


def test_without_questions_there_are_bits_per_byte(cfg, run_dir, documents, tmp_path):
    cfg.suite.tasks = []
    evaluate(cfg, run_dir, documents=documents, tokenizer_dir=tmp_path / "not needed", corpus_hash="c0")
    for result in read_results(run_dir):
        assert result["tasks"] == {} == result["families"]
        assert set(result["bpb"]) == {"de", "el", "pl"}


def test_what_cannot_be_evaluated_is_refused(cfg, run_dir, tmp_path, documents, tokenizer_dir):
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate(cfg, tmp_path / "empty", documents=documents, tokenizer_dir=tokenizer_dir, corpus_hash="c0")
    with pytest.raises(UserError, match="no document"):
        evaluate(cfg, run_dir, documents=[], tokenizer_dir=tokenizer_dir, corpus_hash="c0")


def test_result_is_whole_or_not_there(tmp_path):
    assert read_results(tmp_path) == []
    write_result(tmp_path, {"checkpoint": "step-000000120", "step": 120})
    with pytest.raises(TypeError):
        write_result(tmp_path, {"checkpoint": "step-000000120", "step": 121, "model_sha256": object()})
    assert read_results(tmp_path) == [{"checkpoint": "step-000000120", "step": 120}]
