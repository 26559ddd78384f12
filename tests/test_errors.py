from __future__ import annotations

import doctest

import pytest

import sqft.errors
from sqft.errors import InputError, NumericalError, Problems, SqftError


def test_nothing_is_raised_without_problems():
    with Problems("recipe x.yaml") as problems:
        assert list(problems) == []
    problems.raise_if_any()


def test_one_problem_is_one_line():
    with pytest.raises(InputError) as caught, Problems("recipe x.yaml") as problems:
        problems.add("sparsity is 1.2")
    assert str(caught.value) == "recipe x.yaml: sparsity is 1.2"


def test_all_problems_are_raised_at_once_and_numbered():
    with pytest.raises(InputError) as caught, Problems("recipe x.yaml") as problems:
        problems.add("first")
        problems.add("second")
    assert str(caught.value) == "recipe x.yaml: 2 problems\n  1. first\n  2. second"


def test_an_error_inside_the_block_is_not_hidden():
    with pytest.raises(ZeroDivisionError), Problems("recipe x.yaml") as problems:
        problems.add("first")
        _ = 1 / 0


@pytest.mark.parametrize("kind", [InputError, NumericalError])
def test_the_command_line_catches_one_base(kind):
    assert issubclass(kind, SqftError)
    assert kind("message").exit_code == 2


def test_the_docstring_is_true():
    result = doctest.testmod(sqft.errors)
    assert result.attempted > 0
    assert result.failed == 0
