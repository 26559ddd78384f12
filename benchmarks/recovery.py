"""What brings back the accuracy that zeros and INT4 cost: recipes of the product at equal total steps.

    python benchmarks/recovery.py MODEL --data DIR --out DIR [--steps 120] [--workers 6] [--minutes 6]

Order (compress first, or tune first and compress the tuned model), compensation, linears, rank, learning rate and
distillation, beside dense + LoRA and the dense models of few bits. DIR of the data has MAWPS and SVAMP. The cells are
those of `recovery_cells.py` (`--cells PATTERN ...` takes some, `--list` names them), each trains as many steps in all
as its budget says, the teacher's included. Worker processes share the card; what cells have in common is made once. A
cell that fails is recorded and stops no other. `--result` (OUT/recovery.json) is written anew after each cell, and the
same command goes on where an interrupted one stopped. Validation rows are for choosing among cells, test rows for
reporting.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from common import machine
from recovery_cells import GRID, TASKS, Cell, Scale, beginnings
from recovery_table import pooled, relate, table
from sqft.data.load import load_examples
from sqft.data.sources import FOLDER_VARIABLE
from sqft.digests import digest_text
from sqft.disk import read_json, write_json
from sqft.errors import InputError
from sqft.model.sources import local_folder
from sqft.pipeline import run
from sqft.recipe import DataConfig, Recipe, parse_config
from sqft.versions import versions

ALWAYS = ("dense-x0", "dense-seven-r32-x1")
STAGES = ("teacher_adapter", "teacher", "sparse", "quantized", "adapter", "merged")
LAST = 10  # steps over which the final loss of a training is the mean


@dataclass(frozen=True)
class Job:
    """A recipe to run, in a folder that gets the stages of what it needs; `refused` says why it cannot be run."""

    name: str
    recipe: dict[str, Any]
    out: Path
    needs: Job | None = None
    cell: Cell | None = None
    refused: str | None = None


def do(job: Job) -> dict[str, Any]:
    """Run a job in this process and return what it gave, or its error."""
    start = time.perf_counter()
    try:
        job.out.mkdir(parents=True, exist_ok=True)
        for name in STAGES:  # links: finished stages are found with the settings that they were made with
            made = None if job.needs is None else job.needs.out / name
            if made is not None and made.exists() and not (job.out / name).exists():
                (job.out / name).symlink_to(made.resolve())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        run(parse_config(Recipe, job.recipe, job.name), job.out)
        found = {"status": "done", **facts(job)}
    except Exception as error:
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    if torch.cuda.is_available():
        found["card_peak_bytes"] = torch.cuda.max_memory_allocated()
        gc.collect()  # other processes need what this one has done with
        torch.cuda.empty_cache()
    return {**found, "wall_seconds": round(time.perf_counter() - start, 1)}


def facts(job: Job) -> dict[str, Any]:
    """Return what the folder of a finished job says: seconds of its stages, losses, and what was evaluated."""
    seconds, training = {}, {}
    for name in STAGES:
        file = job.out / name / "sqft" / "manifest.json"
        if file.is_file():
            seconds[name] = read_json(file)["seconds"]
        log = job.out / name / "sqft" / "training_log.json"
        if log.is_file():
            # Of a distilled training the part that compares with the others'.
            losses = [entry.get("task_loss", entry["loss"]) for entry in read_json(log)["train"]]
            result = read_json(file)["result"]
            training[name] = {
                "steps": len(losses),
                "loss": statistics.mean(losses[-LAST:]),
                "seconds_per_step": result["train_seconds"] / len(losses),
                "epochs": len(losses) * job.recipe["finetune" if name == "adapter" else "teacher"]["batch"]
                / result["packed_rows"],
                "trainable_parameters": result["trainable_parameters"],
            }  # fmt: skip
    found = {"seconds": seconds, "training": training}
    if job.cell is None:
        return found
    judged = read_json(job.out / "evaluations" / f"{job.cell.row}.json")
    seconds["evaluate"] = judged["cost"]["seconds"]
    return {**found, "seed": job.recipe["seed"], "tasks": judged["tasks"], "answering": judged["cost"]["answering"]}


def ready() -> None:
    """Let a new process do the imports of all stages, before there is work for it."""
    import matplotlib.figure  # noqa: F401
    import trl.data_utils  # noqa: F401

    import sqft.evaluation.lm_model  # noqa: F401

    if torch.cuda.is_available():
        torch.cuda.init()


def schedule(
    jobs: Sequence[Job],
    pool: ProcessPoolExecutor,
    workers: int,
    deadline: float,
    done: Callable[[Job, dict[str, Any]], None],
) -> None:
    """Run jobs in processes that live on, in order as far as what they need is there; none begins after the deadline.

    A process that dies takes the pool with it: what ran is run once more, in a new one.
    """
    waiting, outcomes = list(jobs), dict[str, dict[str, Any]]()
    tries: dict[str, int] = {}
    running: dict[Future[dict[str, Any]], Job] = {}

    def end(job: Job, outcome: dict[str, Any]) -> None:
        outcomes[job.name] = outcome
        done(job, outcome)

    while waiting or running:
        for job in list(waiting):
            needed = None if job.needs is None else outcomes.get(job.needs.name)
            if needed is not None and needed["status"] == "failed":
                waiting.remove(job)
                end(job, {"status": "failed", "reason": f"{job.needs and job.needs.name}: {needed['reason']}"})
            elif len(running) < workers and time.monotonic() < deadline and (job.needs is None or needed is not None):
                waiting.remove(job)
                running[pool.submit(do, job)] = job
        if not running:
            break  # the rest is too late, or waits for what is
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool) and tries.setdefault(job.name, 0) == 0:
                tries[job.name] += 1
                waiting.insert(0, job)
            else:
                end(job, {"status": "failed", "reason": repr(error)} if error is not None else future.result())
            if isinstance(error, BrokenProcessPool) and not running:
                pool = start(workers)
    pool.shutdown()


def start(workers: int) -> ProcessPoolExecutor:
    """Return processes that have begun their imports."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    for _ in range(workers):
        pool.submit(ready)
    return pool


def plan(cells: Iterable[Cell], model: Path, out: Path, scale: Scale, seeds: Sequence[int]) -> list[Job]:
    """Return the jobs of cells, those that several cells need once, each before what needs it."""
    validation = out / "validation.jsonl"
    rows = load_examples(DataConfig(task=TASKS[0]), "validation", 0)
    validation.write_text("".join(json.dumps({"prompt": e.prompt, "completion": e.answer}) + "\n" for e in rows))
    jobs: dict[str, Job] = {}
    for seed in seeds:
        for cell in cells:
            recipe = cell.recipe(model, validation.resolve(), scale, seed)
            needs = None
            reason = refused(recipe)
            for part in beginnings(recipe) if reason is None else []:
                key = digest_text(json.dumps(part, sort_keys=True))[:8]
                needs = jobs.setdefault(key, Job(key, part, out / "beginnings" / key, needs))
            name = f"{cell.name}-s{seed}"
            jobs[name] = Job(name, recipe, out / "cells" / name, needs, cell, reason)
    return list(jobs.values())


def refused(recipe: dict[str, Any]) -> str | None:
    """Return why the product does not know a recipe."""
    try:
        parse_config(Recipe, recipe, recipe["name"])
    except InputError as error:
        return str(error)
    return None


class Record:
    """The result file: every cell with what is known of it, written whole after each."""

    def __init__(self, path: Path, jobs: Sequence[Job], scale: Scale, settings: Mapping[str, Any]) -> None:
        self.path, self.began = path, time.monotonic()
        self.head = {**settings, "scale": asdict(scale), "machine": machine(), "versions": versions()}
        self.beginnings: dict[str, Any] = {}
        self.cells: dict[str, dict[str, Any]] = {}
        for job in jobs:
            if job.cell is not None:
                steps = job.cell.steps(scale)
                settings = {"steps": list(steps), "bits_per_weight": round(job.cell.bits_per_weight, 3)}
                self.cells[job.name] = {**asdict(job.cell), **settings, "cell": job.cell.name, "status": "not begun"}
        self.write()

    def done(self, job: Job, outcome: dict[str, Any]) -> None:
        """Keep the outcome of a job and say so in a line."""
        at = round(time.monotonic() - self.began)
        if job.cell is None:
            self.beginnings[job.name] = {**outcome, "recipe": job.recipe}
        else:
            self.cells[job.name].update(outcome)
            if outcome["status"] == "done":
                self.cells[job.name]["validation"] = pooled(outcome, ["validation"])
                self.cells[job.name]["test"] = pooled(outcome, TASKS)
        self.write()
        what = outcome.get("seconds") or str(outcome.get("reason"))[:300]
        print(f"{at:4d} s  {job.name}: {outcome['status']} {what}", flush=True)

    def write(self) -> None:
        """Write the file."""
        relate(self.cells)
        seconds = round(time.monotonic() - self.began, 1)
        write_json(self.path, {**self.head, "seconds": seconds, "cells": self.cells, "beginnings": self.beginnings})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder, a .gguf file or a Hub id")
    parser.add_argument("--data", type=Path, help="folder of the data sets; else SQFT_DATA_DIR")
    parser.add_argument("--out", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--result", type=Path, help="the result file; else OUT/recovery.json")
    parser.add_argument("--cells", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=6, help="after which no job begins")
    for name, default in asdict(Scale()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help="see recovery_cells.Scale")
    options = parser.parse_args()
    if options.model is None and not options.list:
        parser.error("which model?")
    return options


def main() -> None:
    options = arguments()
    deadline = time.monotonic() + 60 * options.minutes
    cells = [c for c in GRID if c.name in ALWAYS or any(fnmatch(c.name, pattern) for pattern in options.cells)]
    if options.list:
        print("\n".join(cell.name for cell in cells))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if options.data is not None:
        os.environ[FOLDER_VARIABLE] = str(options.data.resolve())
    scale = Scale(**{name: getattr(options, name) for name in asdict(Scale())})
    options.out.mkdir(parents=True, exist_ok=True)
    pool = start(options.workers)  # its imports go on while the model is unpacked
    model = local_folder(options.model, options.out).resolve()
    jobs = plan(cells, model, options.out.resolve(), scale, options.seeds)
    settings = {"model": options.model, "workers": options.workers, "minutes": options.minutes}
    record = Record(options.result or options.out / "recovery.json", jobs, scale, settings)
    for job in jobs:
        if job.refused is not None:
            record.done(job, {"status": "skipped", "reason": job.refused})
    schedule([job for job in jobs if job.refused is None], pool, options.workers, deadline, record.done)
    record.write()
    print(f"\n{table(record.cells)}\n\nwritten: {record.path}")


if __name__ == "__main__":
    main()
