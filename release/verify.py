"""Checks a release folder the way a stranger would load it: in a fresh process, with transformers alone.

`python -m release.verify FOLDER EXPECTED` compares ids, logits and a greedy continuation with those of `expect`: files
that passed checks of names and shapes have been released with wrong logits.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model.decoder import Decoder

MAX_LOGIT_DIFFERENCE = 1e-4  # in fp32, of any logit
PROMPT_TOKENS, GREEDY_FROM_TOKENS, GREEDY_TOKENS = 256, 32, 16
"""Logits are compared on so many tokens of each prompt, and continuations from its beginning."""


def expect(decoder: Decoder, prompts: Sequence[tuple[str, list[int]]], seq_len: int, folder: Path) -> None:
    """Writes ids, logits and greedy continuations of `prompts`, texts with their ids, by our own decoder in fp32.

    One more prompt fills the whole context, `seq_len`, with all texts in a row: errors of RoPE grow with the position.
    """
    tensors, told = {}, []
    for i, (text, ids) in enumerate(prompts):
        tensors[f"logits/{i}"] = _logits(decoder, ids[: min(PROMPT_TOKENS, seq_len)])
        begun = torch.tensor(ids[: min(GREEDY_FROM_TOKENS, seq_len - GREEDY_TOKENS)])
        told.append({"text": text, "ids": ids, "greedy": decoder.generate_greedily(begun, GREEDY_TOKENS).tolist()})
    whole = list(itertools.islice(itertools.cycle(id_ for _, ids in prompts for id_ in ids), seq_len))
    tensors["whole"], tensors["logits/whole"] = torch.tensor(whole), _logits(decoder, whole)
    save_file(tensors, folder / "logits.safetensors")
    (folder / "prompts.json").write_text(json.dumps(told), encoding="utf-8")


def verify(folder: Path, expected: Path) -> dict[str, Any]:
    """Loads the folder with transformers and returns the figures; an `AssertionError` says what differs and where."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    expected_logits = load_file(expected / "logits.safetensors")
    prompts = json.loads((expected / "prompts.json").read_text(encoding="utf-8"))
    # The continuation is compared token by token, so the end of the text must not end it.
    exactly = {"max_new_tokens": GREEDY_TOKENS, "min_new_tokens": GREEDY_TOKENS, "eos_token_id": None}
    differences = []

    def compare_logits(name: str, ids: list[int]) -> None:
        found = _logits(lambda tokens: model(tokens).logits, ids) - expected_logits[f"logits/{name}"]
        differences.append(found.abs().max().item())
        assert differences[-1] <= MAX_LOGIT_DIFFERENCE, f"prompt {name}: logits differ by {differences[-1]:.2e}"

    for i, prompt in enumerate(prompts):
        ids = tokenizer(prompt["text"])["input_ids"]
        assert ids == prompt["ids"], f"prompt {i}: token ids {ids[:20]}… instead of {prompt['ids'][:20]}…"
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text == prompt["text"], f"prompt {i}: decodes to {text[:80]!r} instead of {prompt['text'][:80]!r}"
        compare_logits(str(i), ids[: len(expected_logits[f"logits/{i}"])])
        begun = torch.tensor(prompt["greedy"][:-GREEDY_TOKENS])[None]
        greedy = model.generate(begun, attention_mask=torch.ones_like(begun), do_sample=False, **exactly)[0].tolist()
        assert greedy == prompt["greedy"], f"prompt {i}: continues with {greedy} instead of {prompt['greedy']}"
    compare_logits("whole", expected_logits["whole"].tolist())
    return {
        "prompts": len(prompts),
        "tokens": sum(len(prompt["ids"]) for prompt in prompts),
        "max_logit_difference": max(differences),
        "greedy_tokens_equal": GREEDY_TOKENS * len(prompts),
        "context_tokens": len(expected_logits["whole"]),
        "transformers": transformers.__version__,
        "model_class": type(model).__name__,
        "tokenizer_class": type(tokenizer).__name__,
    }


def verify_in_fresh_process(folder: Path, expected: Path) -> dict[str, Any]:
    """Runs `verify` in a process that has seen nothing of the training; raises with what it said."""
    command = [sys.executable, "-m", "release.verify", str(folder), str(expected)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"the release does not load as it was trained:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def _logits(model: Callable[[torch.Tensor], torch.Tensor], ids: list[int]) -> torch.Tensor:
    return model(torch.tensor(ids)[None])[0]


if __name__ == "__main__":
    print(json.dumps(verify(Path(sys.argv[1]), Path(sys.argv[2]))))
