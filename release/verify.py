"""Checks a release folder the way a stranger would load it: in a fresh process, with transformers alone.

`python -m release.verify FOLDER EXPECTED` compares, for every prompt in EXPECTED (written by `expect`), token
ids, logits and a greedy continuation with ours. Comparing names and shapes is not enough: files that
passed such checks have been released with wrong logits.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MAX_LOGIT_DIFFERENCE = 1e-4
"""In fp32, on the largest absolute difference of any logit."""
N_GREEDY = 16


def expect(decoder: torch.nn.Module, prompts: Sequence[tuple[str, list[int]]], seq_len: int, folder: Path) -> None:
    """Writes texts, ids, logits and greedy continuations of our own decoder.

    Args:
        decoder: In fp32, with the weights as exported.
        prompts: Texts with their ids, bos included.
        seq_len: Longer prompts are cut to leave room for the continuation.
        folder: Empty.
    """
    tensors, texts = {}, []
    for i, (text, ids) in enumerate(prompts):
        cut = ids[: seq_len - N_GREEDY]
        tokens = torch.tensor(cut)
        with torch.no_grad():
            tensors[f"logits/{i}"] = decoder(tokens[None])[0]
        greedy = decoder.generate_greedily(tokens, N_GREEDY).tolist()  # type: ignore[operator]
        texts.append({"text": text, "ids": ids, "prompt": cut, "greedy": greedy})
    save_file(tensors, folder / "logits.safetensors")
    (folder / "prompts.json").write_text(json.dumps(texts), encoding="utf-8")


def verify(folder: Path, expected: Path) -> dict[str, Any]:
    """Loads the folder with transformers and compares; returns the figures.

    Raises:
        AssertionError: says what differs and where.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    logits = load_file(expected / "logits.safetensors")
    prompts = json.loads((expected / "prompts.json").read_text(encoding="utf-8"))
    worst = 0.0
    for i, prompt in enumerate(prompts):
        ids = tokenizer(prompt["text"])["input_ids"]
        assert ids == prompt["ids"], f"prompt {i}: token ids {ids[:20]}… instead of {prompt['ids'][:20]}…"
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text == prompt["text"], f"prompt {i}: decodes to {text[:80]!r} instead of {prompt['text'][:80]!r}"
        tokens = torch.tensor(prompt["prompt"])[None]
        with torch.no_grad():
            difference = (model(tokens).logits[0] - logits[f"logits/{i}"]).abs().max().item()
        assert difference <= MAX_LOGIT_DIFFERENCE, f"prompt {i}: logits differ by {difference:.2e}"
        worst = max(worst, difference)
        greedy = _generate(model, tokens)
        assert greedy == prompt["greedy"], f"prompt {i}: continues with {greedy} instead of {prompt['greedy']}"
    return {
        "prompts": len(prompts),
        "tokens": sum(len(prompt["ids"]) for prompt in prompts),
        "max_logit_difference": worst,
        "greedy_tokens_equal": N_GREEDY * len(prompts),
        "transformers": transformers.__version__,
        "model_class": type(model).__name__,
        "tokenizer_class": type(tokenizer).__name__,
    }


def verify_in_fresh_process(folder: Path, expected: Path) -> dict[str, Any]:
    """Runs `verify` in a process that has seen nothing of the training; raises with what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "release.verify", str(folder), str(expected)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"the release does not load as it was trained:\n{done.stderr.strip()}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _generate(model: Any, tokens: torch.Tensor) -> list[int]:
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=N_GREEDY,
        min_new_tokens=N_GREEDY,
        do_sample=False,
        # The continuation is compared token by token, so the end of the text must not end it.
        eos_token_id=None,
    )
    return [int(token) for token in out[0]]


if __name__ == "__main__":
    print(json.dumps(verify(Path(sys.argv[1]), Path(sys.argv[2]))))
