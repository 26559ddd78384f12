"""How fast a model is evaluated: our decoding against lm-eval's own Hugging Face model, on the same rows.

    python benchmarks/evaluation.py MODEL_FOLDER [--rows 64] [--batch 32] [--threads 2] [--rounds 3] [--float32]

Generation (MAWPS), multiple choice with long shared prompts (HellaSwag) and with short ones (ARC-easy). Both sides are
lm-eval's evaluator with the same task, rows, batch size and model in memory; only the class that runs the model
differs. Generation has two sides more: what one writes first, transformers' `generate` over the prompts in their order,
batch by batch; and ours with all rows as one batch, which its reading of some thousand tokens at a time allows, and
which would make `generate` no faster. Reported: rows a second of each, alternating, medians; and on how many rows ours
and lm-eval's judge alike. In bfloat16 they may differ at near ties, because batches are padded otherwise and lm-eval
rounds log-likelihoods to bfloat16; with --float32 they do not.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import alternate, ratio, save
from sqft.adapters.attach import load_model
from sqft.data.load import load_examples
from sqft.data.tasks import BUILTIN
from sqft.evaluation import harness
from sqft.evaluation.lm_model import cut_at
from sqft.model.opening import load_tokenizer
from sqft.recipe import DataConfig

TASKS = ("mawps", "hellaswag", "arc_easy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--float32", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model)
    model: Any = load_model(options.model)
    if options.float32:
        model.float()
    ours = harness._language_model()
    from lm_eval.models.huggingface import HFLM

    class Stock(HFLM):
        shortened = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    class Plain(Stock):
        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.tokenizer.padding_side = "left"
            texts = []
            for start in range(0, len(requests), self.batch_size):
                asked = [request.args for request in requests[start : start + self.batch_size]]
                batch = self.tokenizer([prompt for prompt, _ in asked], return_tensors="pt", padding=True)
                found = self.model.generate(**batch, max_new_tokens=asked[0][1]["max_gen_toks"], do_sample=False)
                answers = self.tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
                texts += [cut_at(answer, asked[0][1]["until"]) for answer in answers]
            return texts

    rows = []
    for name in TASKS:
        task = BUILTIN[name]
        examples = load_examples(DataConfig(task=name), "test", 0)[: options.rows]
        judged: dict[str, list[bool]] = {}

        def run(
            kind: type, label: str, batch: int, task: Any = task, examples: Any = examples, judged: Any = judged
        ) -> None:
            harness._language_model = lambda: kind
            judged[label] = harness.score_examples(model, tokenizer, task, examples, batch)

        sides = {"lm-eval": (Stock, options.batch), "sqft": (ours, options.batch)}
        if task.metric == "generate":
            sides |= {"generate": (Plain, options.batch), "sqft, one batch": (ours, len(examples))}
        seconds = alternate(
            {label: partial(run, kind, label, batch) for label, (kind, batch) in sides.items()}, options.rounds
        )
        rows.append(
            {
                "task": name,
                "rows_per_second": {
                    label: round(len(examples) / statistics.median(t), 3) for label, t in seconds.items()
                },
                "speed_up": {
                    label: round(ratio(seconds, label, "sqft"), 2)
                    for label in ("generate", "lm-eval")
                    if label in seconds
                },
                "speed_up_of_one_batch": round(ratio(seconds, "generate", "sqft, one batch"), 2)
                if "generate" in seconds
                else None,
                "judged_alike": sum(a == b for a, b in zip(judged["lm-eval"], judged["sqft"], strict=True)),
                "right": {label: sum(values) for label, values in judged.items()},
            }
        )
        print(rows[-1], flush=True)
    folder = options.model.resolve()
    settings = {
        "model": f"{folder.parent.name}/{folder.name}",
        "rows": options.rows,
        "batch": options.batch,
        "rounds": options.rounds,
    }
    dtype = "float32" if options.float32 else "as stored"
    save("evaluation_float32" if options.float32 else "evaluation", {**settings, "dtype": dtype, "tasks": rows})


if __name__ == "__main__":
    main()
