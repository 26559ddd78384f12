"""Greedy tokens of transformers for a list of prompts: the reference that serve_vllm.py compares vLLM with.

    python tests/serving/reference.py MODEL_DIR JOB.json RESULT.json

JOB.json: {"prompts": [text], "max_tokens": n, "threads": n}. RESULT.json has per prompt its token ids, the greedy
tokens, and at each of them the largest logits and the log-probability of the token; and the tokens that end a text.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

TOP = 20  # logits kept at each step
BATCH = 12  # prompts at once: in bf16 on a CPU one at a time takes ten times as long


@torch.inference_mode()
def greedy(model: Any, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    """Continue prompts of any lengths, past an end-of-text token too, by exactly `max_tokens` tokens each."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    result = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True)
    tokens = result.sequences[:, longest:]
    if tokens.shape[1] != max_tokens:
        raise SystemExit(f"transformers wrote {tokens.shape[1]} tokens, not the {max_tokens} asked for")
    rows = []
    for row, prompt in enumerate(prompts):
        logits = torch.stack([step[row] for step in result.logits]).float()
        top = logits.topk(TOP, dim=-1)
        rows.append({
            "prompt_ids": prompt,
            "tokens": tokens[row].tolist(),
            "logprobs": logits.log_softmax(-1).gather(1, tokens[row, :, None])[:, 0].tolist(),
            "top_ids": top.indices.tolist(),
            "top_logits": top.values.tolist(),
        })  # fmt: skip
    return rows


def main() -> None:
    folder, job_file, result_file = sys.argv[1:]
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    # Nothing of the folder's own generation settings (penalties, sampling) may change the greedy choice.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=job["max_tokens"], eos_token_id=None, pad_token_id=0
    )
    rows, start = [], time.perf_counter()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in job["prompts"]]
    for first in range(0, len(prompts), BATCH):
        rows += greedy(model, prompts[first : first + BATCH], job["max_tokens"])
        print(f"transformers: {len(rows)} of {len(prompts)} prompts", flush=True)
    result = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seconds": time.perf_counter() - start,
        "ends": sorted(ends),
        "rows": rows,
    }
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
