"""Searching sub-adapters on tiny models: scores equal those of extracted adapters; kills and company change nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import pytest
import torch
from safetensors.torch import load_file, save_file

import forked
from sqft.adapters.attach import load_model
from sqft.adapters.cached import cached_weights, switch_ranks
from sqft.adapters.saved import SavedAdapter
from sqft.artifact import Artifact
from sqft.context import Context
from sqft.core.climb import as_configuration, climb
from sqft.core.ranks import RankSpace
from sqft.data.tasks import Example, Task
from sqft.errors import InputError
from sqft.evaluation.harness import score_examples
from sqft.evaluation.prepacked import _has_kernels, _Reordered, prepacked
from sqft.model.opening import load_tokenizer
from sqft.recipe import FinetuneConfig, QuantizeConfig, SearchConfig, SparsifyConfig
from sqft.stages import extract, finetune, quantize, sparsify
from sqft.stages.extract import search as search_module
from sqft.stages.extract import study as study_module
from sqft.stages.extract.search import pareto_front
from sqft.stages.extract.study import HillClimbing, open_study, running

TASK = Task("pick", "choice")
DRAW = random.Random(0)


def letters(count: int) -> str:
    return "".join(DRAW.choices("abcdefghijklmnopqrstuvwxyz", k=count))


CHOICES = [tuple(f" {letters(3)}" for _ in range(3)) for _ in range(24)]
EXAMPLES = [Example(letters(12), choices[i % 3], choices, i % 3) for i, choices in enumerate(CHOICES)]
ROWS = [(TASK, EXAMPLES)]
TOKENS = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(0))
SETTINGS = {"strategy": "hill_climbing", "turns": 3, "neighbours": 3, "steps": 2, "samples": 16, "batch": 8}


def make(tiny_model: Callable[..., Path], folder: Path, kind: str) -> tuple[Path, Path]:
    """Return (base, super-adapter) whose sub-adapters answer differently."""
    model, base, adapter = tiny_model("llama", "bfloat16"), folder / "base", folder / "adapter"
    if kind == "quantized":
        quantize.run(QuantizeConfig(group_size=16), model, TOKENS, base, Context(), sparsify=SparsifyConfig())
    else:
        sparsify.run(SparsifyConfig(), model, TOKENS, base, Context())
    config = FinetuneConfig.model_validate({"kind": kind, "ranks": [8, 4, 2], "max_steps": 2, "length": 64, "batch": 2})
    finetune.run(config, base, [(e.prompt, e.answer) for e in EXAMPLES], [], adapter, Context(), data={})
    tensors = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    strong = {k: torch.randn(t.shape, generator=generator) if "lora_B" in k else t for k, t in tensors.items()}
    save_file(strong, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "sqft" / "manifest.json").unlink()  # it is another adapter now
    return base, adapter


@pytest.fixture(scope="module", params=["sparse", "quantized", "dense"])
def trained(request: Any, tiny_model: Callable[..., Path], tmp_path_factory: Any) -> tuple[Path, Path]:
    return make(tiny_model, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def sparse(tiny_model: Callable[..., Path], tmp_path_factory: Any) -> tuple[Path, Path]:
    return make(tiny_model, tmp_path_factory.mktemp("sparse"), "sparse")


def run(trained: tuple[Path, Path], out: Path, **options: Any) -> dict[str, Any]:
    base, adapter = trained
    config = SearchConfig.model_validate(SETTINGS | options)
    extract.run(config, adapter, out, Context(3), base=base, rows=ROWS)
    return json.loads((out / "sqft" / "search.json").read_text())


def plain(record: dict[str, Any]) -> Any:
    """A record without what differs from run to run."""
    trials = sorted(
        ({k: v for k, v in trial.items() if k != "seconds"} for trial in record["trials"]),
        key=lambda t: str(t["ranks"]),
    )
    return {k: {n: v for n, v in record[k].items() if n != "seconds"} for k in ("chosen", "heuristic")} | {"t": trials}


def test_a_configuration_scores_as_the_sub_adapter_that_is_extracted_for_it(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = trained
    record = run(trained, tmp_path / "sub")
    tokenizer = load_tokenizer(base)
    assert len(record["trials"]) == 10
    for number, trial in enumerate([*record["trials"][:4], record["chosen"]]):
        (tmp_path / f"{number}.json").write_text(json.dumps(trial["ranks"]))
        config = SearchConfig(strategy="file", ranks_file=str(tmp_path / f"{number}.json"))
        extract.run(config, adapter, tmp_path / str(number), Context())
        model = load_model(base, tmp_path / str(number))
        right = score_examples(model, tokenizer, TASK, EXAMPLES[:16], 4)
        assert trial["accuracy"] == pytest.approx(sum(right) / 16)
        assert trial["parameters"] == sum(
            low.lora_A.numel() + low.lora_B.numel()
            for low in SavedAdapter.open(tmp_path / str(number)).modules.values()
        )
    # The chosen one is what was written, and what Algorithm 1 chooses of these scores.
    space = SavedAdapter.open(adapter).rank_space()
    scores = {as_configuration(space, trial["ranks"]): trial["accuracy"] for trial in record["trials"]}
    assert len(set(scores.values())) > 2
    state = climb(space, scores, turns=3, neighbours=3, steps=2, seed=3)
    assert state.wanted == ()
    assert as_configuration(space, record["chosen"]["ranks"]) == state.anchor
    assert json.loads((tmp_path / "sub" / "sqft" / "ranks.json").read_text())["ranks"] == record["chosen"]["ranks"]
    assert Artifact.open(tmp_path / "sub").manifest["result"]["accuracy"] == record["chosen"]["accuracy"]
    assert record["chosen"]["accuracy"] >= record["heuristic"]["accuracy"]


def test_cached_weights_answer_to_the_bit_and_follow_the_ranks(trained: tuple[Path, Path]) -> None:
    base, adapter = trained
    model = load_model(base, adapter, elastic=True)
    ids = torch.arange(3, 20)[None]
    space = SavedAdapter.open(adapter).rank_space()
    largest, smallest = space.per_module(space.maximal()), space.per_module(space.minimal())
    with torch.no_grad():
        live = {}
        for name, ranks in (("max", largest), ("min", smallest)):
            switch_ranks(model, ranks)
            live[name] = model(input_ids=ids).logits
        assert not torch.equal(live["max"], live["min"])
        with cached_weights(model):
            assert torch.equal(model(input_ids=ids).logits, live["min"])
            assert switch_ranks(model, largest) == len(largest)
            assert torch.equal(model(input_ids=ids).logits, live["max"])
            assert switch_ranks(model, largest) == 0
            if _has_kernels():
                with patch("sqft.evaluation.prepacked._form", return_value=_Reordered), prepacked(model):
                    assert torch.equal(model(input_ids=ids).logits, live["max"])
        assert torch.equal(model(input_ids=ids).logits, live["max"])


@pytest.mark.parametrize(
    ("strategy", "evaluations"), [("hill_climbing", 0), ("hill_climbing", 5), ("random", 1), ("nsga2", 0), ("nsga2", 5)]
)
def test_a_killed_search_goes_on_to_the_same_end(
    strategy: str, evaluations: int, sparse: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(sparse, tmp_path / "whole", strategy=strategy)
    original, calls = search_module.evaluate_examples, []

    def killed(*arguments: Any, **options: Any) -> Any:
        if len(calls) == evaluations:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(search_module, "evaluate_examples", killed)
        with pytest.raises(KeyboardInterrupt):
            run(sparse, tmp_path / "cut", strategy=strategy)
    assert not (tmp_path / "cut").exists()
    counted: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(search_module, "evaluate_examples", lambda *a: counted.append(1) or original(*a))
        assert plain(run(sparse, tmp_path / "cut", strategy=strategy)) == plain(whole)
    assert len(counted) <= 10 - evaluations  # nothing is evaluated twice
    # And a finished one is not run again.
    monkeypatch.setattr(search_module, "evaluate_examples", killed)
    run(sparse, tmp_path / "cut", strategy=strategy)


def test_every_strategy_has_the_heuristic_first_and_keeps_the_budget(sparse: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = sparse
    heuristic = SavedAdapter.open(adapter).rank_space().heuristic()
    for strategy in ("hill_climbing", "random", "nsga2"):
        record = run(sparse, tmp_path / strategy, strategy=strategy)
        assert record["trials"][0]["ranks"] == heuristic
        assert 2 <= len(record["trials"]) <= 10
        best = max(record["trials"], key=lambda trial: trial["accuracy"])["accuracy"]
        assert record["chosen"]["accuracy"] == best
        for trial in record["trials"]:  # nothing dominates the front
            assert any(
                p["accuracy"] >= trial["accuracy"] and p["parameters"] <= trial["parameters"] for p in record["front"]
            )


def test_the_front_drops_what_is_worse_and_larger() -> None:
    trials = [{"accuracy": a, "parameters": p} for a, p in [(0.5, 9), (0.7, 9), (0.7, 8), (0.6, 8), (0.4, 2), (0.3, 5)]]
    assert [(t["accuracy"], t["parameters"]) for t in pareto_front(trials)] == [(0.7, 8), (0.4, 2)]


def test_a_dead_worker_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = RankSpace((4, 2), {"a": ("a",), "b": ("b",)})
    study = open_study(tmp_path / "s.study", "s", pareto=False)
    study.sampler = sampler = HillClimbing(space, turns=2, neighbours=2, steps=1)
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    trial = study.ask(study_module.distributions(space))
    trial.set_user_attr("worker", f"{study_module.socket.gethostname()}:{gone.pid}:0.0")
    assert running(study) == []
    assert sampler.free(study) == [as_configuration(space, space.heuristic())]
    alive = study.ask(study_module.distributions(space))
    alive.set_user_attr("worker", study_module.worker())
    assert [t.number for t in running(study)] == [alive.number]
    assert sampler.free(study) == []  # the heuristic is being evaluated, and all else waits for it
    # However long it takes: a process of this machine is dead when it is gone. Another one with its number is not it.
    monkeypatch.setattr(study_module, "_STALE_SECONDS", -1.0)
    assert [t.number for t in running(study)] == [alive.number]
    alive.set_user_attr("worker", f"{study_module.socket.gethostname()}:{os.getpid()}:1.0")
    assert running(study) == []


def test_what_a_killed_process_leaves_of_a_study_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("folder/s.study")  # a relative path: Optuna's own lock stood for ever there
    file.parent.mkdir()
    open_study(file, "s", pareto=False).ask({})
    code = (
        "import os, signal; from pathlib import Path; from sqft.stages.extract.study import _JournalLock; "
        "_JournalLock(Path('folder/s.study')).acquire(); print('holds it', flush=True); "
        "open('folder/s.study', 'ab').write(b'{half a li'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "holds it\n"), killed.stderr
    study = open_study(file, "s", pareto=False)  # waits for a lock that is held
    study.ask({})
    assert [trial.number for trial in study.trials] == [0, 1]


@pytest.mark.parametrize("strategy", ["random", "nsga2"])
def test_the_heuristic_is_asked_for_again_when_its_process_is_gone(strategy: str, tmp_path: Path) -> None:
    space = RankSpace((4, 2), {"a": ("a",), "b": ("b",), "c": ("c",)})
    study = open_study(tmp_path / "s.study", "s", pareto=strategy == "nsga2")
    study.enqueue_trial(space.heuristic())
    lost = study.ask(study_module.distributions(space))
    lost.set_user_attr("worker", f"{study_module.socket.gethostname()}:999999999:0.0")
    config = SearchConfig.model_validate(SETTINGS | {"strategy": strategy})
    searcher = search_module._Searcher(config, space, study, seed=2**40)
    while (trial := searcher.ask()) is not None:
        value = sum(trial.params.values()) / 12
        study.tell(trial, [value, -value] if strategy == "nsga2" else value)
    assert as_configuration(space, space.heuristic()) in searcher.scores()
    # The space holds fewer configurations than the budget.
    assert len(searcher.scores()) == 8 < config.budget


@pytest.mark.parametrize("strategy", ["random", "nsga2"])
def test_a_configuration_that_is_drawn_again_is_not_counted_again(strategy: str, tmp_path: Path) -> None:
    space = RankSpace((6, 4, 2), {"a": ("a",), "b": ("b",), "c": ("c",)})
    study = open_study(tmp_path / "s.study", "s", pareto=strategy == "nsga2")
    config = SearchConfig.model_validate(SETTINGS | {"strategy": strategy, "turns": 6})
    searcher = search_module._Searcher(config, space, study, seed=0)
    while (trial := searcher.ask()) is not None:
        value = sum(trial.params.values()) / 18
        study.tell(trial, [value, -value] if strategy == "nsga2" else value)
    assert config.budget < len(study.get_trials()) <= 10 * config.budget
    assert len(searcher.scores()) == config.budget or len(study.get_trials()) == 10 * config.budget


def test_the_study_is_an_ordinary_one_that_optuna_opens(sparse: tuple[Path, Path], tmp_path: Path) -> None:
    run(sparse, tmp_path / "sub")
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "sub.study"))
    (name,) = optuna.get_all_study_names(optuna.storages.JournalStorage(backend))
    study = optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))
    assert len(study.trials) == 10
    assert set(study.best_params) == set(SavedAdapter.open(sparse[1]).rank_space().groups)


def test_what_cannot_be_searched_is_refused(sparse: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = sparse
    config = SearchConfig.model_validate(SETTINGS)
    with pytest.raises(InputError, match="needs the base model and validation rows"):
        extract.run(config, adapter, tmp_path / "a", Context())
    with pytest.raises(InputError, match="needs the base model and validation rows"):
        extract.run(config, adapter, tmp_path / "a", Context(), base=base, rows=[(TASK, [])])
    extract.run(SearchConfig(strategy="maximal"), adapter, tmp_path / "one", Context())
    modules = list(SavedAdapter.open(tmp_path / "one").modules)
    (tmp_path / "one" / "sqft" / "manifest.json").unlink()
    (tmp_path / "one" / "sqft" / "rank_space.json").write_text(json.dumps({"choices": [8], "groups": {"g": modules}}))
    with pytest.raises(InputError, match="has the one rank 8, so there is nothing to search"):
        extract.run(config, tmp_path / "one", tmp_path / "a", Context(), base=base, rows=ROWS)


def test_two_workers_take_different_configurations(tmp_path: Path) -> None:
    space = RankSpace((8, 6, 4, 2), {"a": ("a",), "b": ("b",), "c": ("c",)})
    config = SearchConfig.model_validate(SETTINGS | {"strategy": "hill_climbing", "neighbours": 4})
    studies = [open_study(tmp_path / "s.study", "s", pareto=False) for _ in range(2)]
    workers = [search_module._Searcher(config, space, study, seed=0) for study in studies]
    first = workers[0].ask()
    assert first is not None
    studies[0].tell(first, 0.5)  # the heuristic, which all else waits for
    asked = [workers[k % 2].ask() for k in range(4)]
    taken = {as_configuration(space, trial.params) for trial in asked if trial is not None}
    assert len(taken) == 4
    assert as_configuration(space, first.params) not in taken


@pytest.mark.slow
def test_two_processes_share_a_search(sparse: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = sparse
    for split in ("train", "validation"):
        lines = [json.dumps({"prompt": f"{split} {e.prompt}", "completion": e.answer}) for e in EXAMPLES]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))

    def search(name: str) -> None:
        command = [
            "search", str(adapter), str(tmp_path / name), "--base", str(base), "--task", str(tmp_path), "--strategy",
            "hill_climbing", "--turns", "4", "--neighbours", "4", "--steps", "2",
        ]  # fmt: skip
        done = forked.run(command)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor() as threads:
        for finished in [threads.submit(search, name) for name in ("shared", "shared", "alone")]:
            finished.result()
    records = [json.loads((tmp_path / n / "sqft" / "search.json").read_text()) for n in ("shared", "alone")]
    assert plain(records[0]) == plain(records[1])
