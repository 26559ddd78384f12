from __future__ import annotations

import pytest
import yaml
from pydantic import ValidationError

from sqft.errors import InputError
from sqft.recipe import (
    DataConfig,
    FinetuneConfig,
    Recipe,
    SparsifyConfig,
    TeacherConfig,
    load_recipe,
    parse_config,
    parse_pattern,
)

SMALL = """
name: small
model: some/model
data: {task: gsm8k}
"""


@pytest.fixture
def recipe_file(tmp_path):
    def write(text=SMALL):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def message_of(path, overrides=None):
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_a_small_recipe_gets_defaults(recipe_file):
    recipe = load_recipe(recipe_file())
    assert recipe.data.task == "gsm8k"
    assert recipe.sparsify is None
    assert recipe.finetune == FinetuneConfig()
    assert recipe.seed == 0


def test_none_turns_a_stage_off(recipe_file):
    assert load_recipe(recipe_file(SMALL + "finetune: null\n")).finetune is None


def test_a_recipe_cannot_be_changed(recipe_file):
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(recipe_file()).seed = 1


def test_a_recipe_survives_dumping_and_loading(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(SMALL + "sparsify: {pattern: 2:4}\n"))
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(again) == recipe


class TestUnknownKeys:
    def test_the_nearest_right_key_is_named(self, recipe_file):
        text = message_of(recipe_file(SMALL + "sparsify: {sparcity: 0.5}\n"))
        assert "unknown key 'sparsify.sparcity'; did you mean 'sparsity'?" in text

    def test_at_the_top(self, recipe_file):
        assert "unknown key 'fine_tune'; did you mean 'finetune'?" in message_of(recipe_file(SMALL + "fine_tune: {}\n"))

    def test_two_levels_down(self, recipe_file):
        text = message_of(recipe_file(SMALL + "sparsify: {calibration: {sample: 3}}\n"))
        assert "unknown key 'sparsify.calibration.sample'; did you mean 'samples'?" in text

    def test_all_known_keys_where_nothing_is_near(self, recipe_file):
        text = message_of(recipe_file(SMALL + "merge: {zzz: 3}\n"))
        assert "unknown key 'merge.zzz'; known keys are allow_sparsity_loss" in text


def test_all_problems_are_listed_at_once(recipe_file):
    text = message_of(
        recipe_file("name: x\ndata: {taks: gsm8k}\nseed: -1\nsparsify: {sparsity: 1.5}\nfinetune: {ranks: [0]}\n")
    )
    assert "6 problems" in text
    for part in [
        "model: Field required",
        "data.task: Field required",
        "unknown key 'data.taks'; did you mean 'task'?",
        "seed: Input should be greater than or equal to 0",
        "sparsify.sparsity: sparsity is 1.5; choose a number strictly between 0 and 1",
        "finetune.ranks.0: Input should be greater than or equal to 1",
    ]:
        assert part in text
    assert text.startswith("recipe ")
    assert "recipe.yaml" in text.splitlines()[0]


class TestSparsity:
    @pytest.mark.parametrize("value", [0, 1, -0.5, 1.2, float("nan"), float("inf")])
    def test_outside_is_refused(self, value):
        with pytest.raises(InputError, match=r"sparsity: sparsity is .*; choose a number strictly between 0 and 1"):
            parse_config(SparsifyConfig, {"sparsity": value}, "here")

    @pytest.mark.parametrize("value", [0.01, 0.5, 0.99])
    def test_inside_is_kept(self, value):
        assert SparsifyConfig(sparsity=value).sparsity == value

    def test_it_must_agree_with_the_pattern(self):
        with pytest.raises(InputError, match=r"pattern 2:4 has sparsity 0.5, but sparsity is 0.7; leave sparsity out"):
            parse_config(SparsifyConfig, {"sparsity": 0.7, "pattern": "2:4"}, "here")
        SparsifyConfig(sparsity=0.75, pattern="1:4")

    def test_a_pattern_alone_is_enough(self):
        assert SparsifyConfig(pattern="4:8").pattern == "4:8"


class TestPattern:
    @pytest.mark.parametrize(("text", "expected"), [("unstructured", None), ("2:4", (2, 4)), ("16:32", (16, 32))])
    def test_known_forms(self, text, expected):
        assert parse_pattern(text) == expected

    @pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "2/4", "2:4:8", "", "-1:4", "row"])
    def test_others_are_refused(self, text):
        with pytest.raises(ValueError, match=r"pattern is .*; use 'unstructured' or 'N:M' with 0 < N < M"):
            parse_pattern(text)


class TestYamlNumbers:
    """PyYAML alone reads `2:4` as 124, and `3e-4` as text."""

    def test_a_pattern_needs_no_quotes(self, recipe_file):
        path = recipe_file(SMALL + "sparsify: {pattern: 2:4}\n")
        assert load_recipe(path).sparsify.pattern == "2:4"
        assert load_recipe(path, ["sparsify.pattern=4:8"]).sparsify.pattern == "4:8"

    @pytest.mark.parametrize("text", ["3e-4", "0.0003", "3.0e-04", ".3e-3", "+3E-4"])
    def test_exponents_are_numbers(self, text, recipe_file):
        options = "{a: " + text + "}"
        recipe = load_recipe(recipe_file(f"name: x\nmodel: m\ndata: {{task: t, options: {options}}}\n"))
        assert recipe.data.options == {"a": 0.0003}

    def test_other_values_are_what_they_look_like(self, recipe_file):
        options = "{a: 12, b: -3, c: 1.5, d: true, e: null, f: 1.2.3, g: '7', h: '0x', i: 10:30, j: .inf, k: 007}"
        recipe = load_recipe(recipe_file(f"name: x\nmodel: m\ndata: {{task: t, options: {options}}}\n"))
        assert recipe.data.options == {
            "a": 12,
            "b": -3,
            "c": 1.5,
            "d": True,
            "e": None,
            "f": "1.2.3",
            "g": "7",
            "h": "0x",
            "i": "10:30",
            "j": float("inf"),
            "k": 7,
        }


class TestOverrides:
    def test_values_are_yaml(self, recipe_file):
        recipe = load_recipe(
            recipe_file(), ["finetune.ranks=[8, 4]", "seed=7", "finetune.max_steps=null", "data.task=boolq"]
        )
        assert recipe.finetune.ranks == [8, 4]
        assert recipe.seed == 7
        assert recipe.data.task == "boolq"

    def test_they_open_a_stage_that_was_off(self, recipe_file):
        recipe = load_recipe(recipe_file(SMALL + "sparsify: null\n"), ["sparsify.calibration.samples=8"])
        assert recipe.sparsify.calibration.samples == 8

    def test_the_last_one_wins(self, recipe_file):
        assert load_recipe(recipe_file(), ["seed=1", "seed=2"]).seed == 2

    def test_a_value_may_hold_an_equals_sign(self, recipe_file):
        assert load_recipe(recipe_file(), ["note=a=b"]).note == "a=b"

    def test_unknown_keys_are_named(self, recipe_file):
        assert "did you mean 'epochs'?" in message_of(recipe_file(), ["finetune.epoch=1"])

    def test_without_equals_sign(self, recipe_file):
        assert "--set seed: write it as key=value" in message_of(recipe_file(), ["seed"])

    def test_below_a_value(self, recipe_file):
        assert "--set seed.x=1: seed is a value" in message_of(recipe_file("name: x\nseed: 3\n"), ["seed.x=1"])

    def test_not_yaml(self, recipe_file):
        assert "--set finetune.ranks=[8: the value is not valid YAML" in message_of(
            recipe_file(), ["finetune.ranks=[8"]
        )


class TestFiles:
    def test_missing(self, tmp_path):
        assert "cannot be read (No such file or directory)" in message_of(tmp_path / "none.yaml")

    def test_a_folder(self, tmp_path):
        assert "cannot be read (Is a directory)" in message_of(tmp_path)

    def test_not_yaml(self, recipe_file):
        assert "not valid YAML" in message_of(recipe_file("a: [1"))

    def test_not_text(self, tmp_path):
        path = tmp_path / "binary.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        assert "not valid YAML" in message_of(path)

    def test_not_a_mapping(self, recipe_file):
        assert "holds list, not a mapping" in message_of(recipe_file("- 1\n"))
        assert "holds NoneType, not a mapping" in message_of(recipe_file(""))

    def test_no_code_is_run(self, recipe_file, tmp_path):
        message_of(recipe_file(f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n"))
        assert not (tmp_path / "made").exists()


def test_a_key_that_is_no_text_is_refused(recipe_file):
    assert "1" in message_of(recipe_file(SMALL + "1: 2\n"))


def test_the_schema_describes_every_unit():
    schema = Recipe.model_json_schema()
    calibration = schema["$defs"]["CalibrationConfig"]["properties"]
    assert all("description" in field for field in calibration.values())


def test_lists_are_checked_item_by_item():
    with pytest.raises(InputError, match=r"here: train_limit: Input should be greater than or equal to 1"):
        parse_config(DataConfig, {"task": "x", "train_limit": 0}, "here")


class TestDistill:
    def test_it_is_off_and_then_in_no_key(self):
        assert FinetuneConfig().distill is None
        assert "distill" not in FinetuneConfig().model_dump()
        assert "distill" not in TeacherConfig().model_dump()
        made = FinetuneConfig(distill={"hidden": 1})
        assert made.model_dump()["distill"] == {"hidden": 1.0, "logits": 0.0}
        assert FinetuneConfig(**made.model_dump()) == made

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("finetune: {distill: {}}", "finetune.distill: hidden and logits are both 0, so nothing is learnt"),
            (
                "finetune: {distill: {hidden: -1}}",
                "finetune.distill.hidden: Input should be greater than or equal to 0",
            ),
            ("finetune: {distill: {logits: .nan}}", "finetune.distill.logits: Input should be a finite number"),
            ("finetune: {distill: {logit: 1}}", "unknown key 'finetune.distill.logit'; did you mean 'logits'?"),
            ("teacher: {distill: {hidden: 1}}", "teacher.distill: a teacher has no teacher; leave it out, or write it"),
        ],
    )
    def test_what_says_nothing_is_refused(self, text, message, recipe_file):
        assert message in message_of(recipe_file(f"{SMALL}sparsify: {{}}\n{text}\n"))

    def test_something_must_be_compressed(self, recipe_file):
        text = SMALL + "finetune: {distill: {hidden: 1}}\n"
        assert "the teacher would be the very model that is tuned; add sparsify or quantize" in message_of(
            recipe_file(text)
        )
        assert load_recipe(recipe_file(text + "sparsify: {}\n")).finetune.distill.hidden == 1
        assert "very model" in message_of(recipe_file(text + "teacher: {model: mine}\n"))


class TestData:
    def test_a_date_is_iso_text_however_yaml_reads_it(self, recipe_file):
        text = SMALL.replace("{task: gsm8k}", "{task: gsm8k, date: DATE}")
        for written, read in (
            ("2026-01-31", "2026-01-31"),
            ("2026-01-31 09:30:00", "2026-01-31T09:30:00"),
            ("'2026-01-31T09:30:00'", "2026-01-31T09:30:00"),
            ("null", None),
        ):
            assert load_recipe(recipe_file(text.replace("DATE", written))).data.date == read
        assert "date is 'today'; write it as 2026-01-31" in message_of(recipe_file(text.replace("DATE", "today")))

    def test_what_most_data_has_none_of_stands_in_no_key(self):
        old = {
            "task": "gsm8k", "template": None, "train_limit": None, "validation_rows": 0, "test_rows": 0,
            "chat_template": False, "options": {},
        }  # fmt: skip
        data = DataConfig(task="gsm8k")
        assert data.model_dump(mode="json") == data.model_dump() == old
        assert list(data.model_dump(mode="json")) == list(old)
        set_ = DataConfig(task="gsm8k", date="2026-01-31", revision="v1")
        assert set_.model_dump(mode="json") == {**old, "revision": "v1", "date": "2026-01-31"}
        assert DataConfig(**set_.model_dump(mode="json")) == set_
        recipe = Recipe(name="a", model="b", data=data)
        assert "date" not in recipe.model_dump(mode="json")["data"]
        assert recipe.model_dump(mode="json", exclude_defaults=True)["data"] == {"task": "gsm8k"}
