"""Writes a checkpoint as the folder that transformers, vLLM, SGLang and llama.cpp's converter read."""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from configs.enums import Precision
from configs.schema import RunConfig
from data.manifest import Manifest
from model.decoder import Decoder
from model.hf import to_their_config, to_their_state

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def export_folder(decoder: Decoder, cfg: RunConfig, corpus_dir: Path, folder: Path) -> None:
    """Fills an empty folder with weights, configs and tokenizer.

    Weights are stored in the precision the run computed in, rounded once from the fp32 master weights.
    config.json is written by us and not by `save_pretrained`, which leaves out what transformers 4 reads.
    """
    tokenizer = Manifest.load(corpus_dir).tokenizer
    dtype = torch.bfloat16 if cfg.engine.precision is Precision.bf16 else torch.float32
    state = {name: tensor.to(dtype) for name, tensor in to_their_state(decoder.state_dict()).items()}
    save_torch_state_dict(state, folder, max_shard_size="5GB", metadata={"format": "pt"})
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    config = to_their_config(
        cfg.model,
        vocab_rows=decoder.embedding.weight.shape[0],
        seq_len=cfg.train.seq_len,
        **ids,
        dtype=str(dtype).removeprefix("torch."),
    )
    # Written out, since what transformers derives by itself is marked as such and then changes with its version.
    generation = {name.replace("_", "_token_"): id_ for name, id_ in ids.items()} | {"do_sample": False}
    for name, content in {"config": config, "generation_config": generation}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(corpus_dir / "tokenizer" / name, folder / name)
