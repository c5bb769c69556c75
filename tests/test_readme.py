"""What the README says is so: its code runs, its tables are the committed results."""

import re
from pathlib import Path

import pytest

import adamjax.testing
from benchmarks import readme

TEXT = readme.README.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[b.strip().splitlines()[0] for b in BLOCKS])
def test_code_runs_as_printed(block):
    exec(compile(block, "README.md", "exec"), {})


def test_train_step_has_twelve_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) == 12


def test_tables_are_the_committed_results():
    assert readme.rendered(TEXT) == TEXT, "run `make readme`"


def test_every_test_that_a_decision_names_exists():
    tests = Path(__file__).parent
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", TEXT)
    assert named
    for file, function in named:
        source = (tests / file).read_text()
        assert f"def {function}" in source, f"{file} has no {function}"
    laws = re.findall(r"the law `(\w+)`", TEXT)
    assert laws
    assert set(laws) <= set(adamjax.testing.LAWS)
