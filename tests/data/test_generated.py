from __future__ import annotations

import logging
from typing import Any

import pytest

from sqft.data.load import load_examples, resolve_task
from sqft.data.tasks import Example
from sqft.errors import InputError
from sqft.recipe import DataConfig

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")


def gym(name: str = "gsm_symbolic", **options: Any) -> DataConfig:
    return DataConfig(task=f"gym:{name}", options={"train_size": 60, "validation_size": 20, "test_size": 30, **options})


def questions(examples: list[Example]) -> set[str]:
    return {example.question for example in examples}


def test_problems_are_worded_as_questions_and_judged_exactly() -> None:
    config = gym("chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2})
    assert resolve_task(config).metric == "exact"
    assert not resolve_task(config).fold_punctuation  # 5 - 3 is not 5 * 3
    for example in load_examples(config, "test", 0):
        assert example.prompt == f"Question: {example.question}\nAnswer:"
        first, sign, second = example.question.split("problem:")[1].strip().rstrip("=").split()
        assert int(example.answer) == (int(first) + int(second) if sign == "+" else int(first) - int(second))
        assert example.answer.startswith(" ")


def test_rows_depend_on_the_data_s_seed_and_not_on_the_run_s() -> None:
    assert load_examples(gym(), "train", 0) == load_examples(gym(), "train", 1)
    assert load_examples(gym(seed=1), "test", 0) != load_examples(gym(), "test", 0)
    assert len(load_examples(gym(), "test", 0)) == 30
    assert len(load_examples(gym(), "validation", 0)) == 20


def test_splits_share_no_question_and_no_seed(caplog: pytest.LogCaptureFixture) -> None:
    # Sums of two digits: 100 questions in all, so the splits collide whatever their seeds.
    small = gym("chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    with caplog.at_level(logging.INFO, "sqft"):
        train = load_examples(small, "train", 0)
    assert "train rows whose question stands in test" in caplog.text
    assert 0 < len(train) < 60
    test, validation = load_examples(small, "test", 0), load_examples(small, "validation", 0)
    assert not questions(train) & questions(test)
    assert not questions(train) & questions(validation)
    assert not questions(validation) & questions(test)
    # Neighbouring seeds would share nearly all rows of a generator that draws row i from seed + i.
    wide = gym("chain_sum", config={"min_digits": 9, "max_digits": 9})
    sets = [questions(load_examples(wide, split, 0)) for split in ("train", "validation", "test")]
    sets += [questions(load_examples(gym("chain_sum", seed=1, config=wide.options["config"]), "train", 0))]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 60 + 20 + 30 + 60


def test_with_choices_the_likeliest_of_them_is_judged() -> None:
    config = gym("isomorphic_strings", choices=["True", "False"])
    assert resolve_task(config).metric == "choice"
    for example in load_examples(config, "test", 0):
        assert example.choices == (" True", " False")
        assert example.choices[example.gold or 0] == example.answer
    with pytest.raises(InputError, match=r"its answer 'False' is not among data.options.choices"):
        load_examples(gym("isomorphic_strings", choices=["True", "perhaps"]), "test", 0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coin_flip", {"choices": ["yes"]}, "choices is .*; give the list of all answers, at least two"),
        ("coin_flip", {"choices": "yes, no"}, "choices is 'yes, no'; give the list"),
        ("gcd", {"train_sise": 3}, "unknown option 'train_sise'; did you mean 'train_size'"),
        ("gcd", {"min_numbers": 3}, "unknown option 'min_numbers'; known are .* stand in 'config'"),
        ("gcd", {"test_size": -1}, "test_size is -1; choose a whole number"),
        ("gcd", {"test_size": "many"}, "test_size is 'many'"),
        ("gcd", {"config": 3}, "config is int, not a mapping"),
        ("gcd", {"config": {"no_such": 3}}, "options.config is refused .*no_such"),
        ("gcd", {"config": {"size": 3}}, "options.config is refused"),
        ("gsm_symbolics", {}, "no data set 'gsm_symbolics'; did you mean gsm_symbolic"),
        ("gcd", {"test_size": 0}, "see options.test_size.*has no rows"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_examples(gym(name, **options), "test", 0)


def test_all_wrong_options_are_listed_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)2 problems.*sise.*seed is 1\.5"):
        resolve_task(gym(sise=3, seed=1.5))
