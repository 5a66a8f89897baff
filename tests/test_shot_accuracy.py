"""The metric module of the `evaluate` library, and the examples that document it."""

import doctest
import re

import evaluate
import pytest
from conftest import ROOT

from ride_bf.evaluation.metrics import shot_accuracy

README = (ROOT / "ride_bf" / "shot_accuracy" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_it_gives_what_the_function_gives():
    predictions, labels, counts = [0, 1, 1, 2, 2], [0, 0, 1, 2, 2], [400, 40, 4, 4]
    metric = evaluate.load("ride_bf/shot_accuracy")
    expected = shot_accuracy(predictions, labels, counts)
    assert metric.compute(predictions=predictions, references=labels, class_counts=counts) == expected


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_cards_examples_run(example):
    exec(example, {})


def test_the_docstrings_example_runs():
    metric = evaluate.load("ride_bf/shot_accuracy")
    test = doctest.DocTestParser().get_doctest(metric.inputs_description, {"evaluate": evaluate}, "example", None, 0)
    assert len(test.examples) == 5
    assert doctest.DocTestRunner().run(test).failed == 0


def test_both_are_documented_by_an_example():
    assert len(EXAMPLES) == 3
