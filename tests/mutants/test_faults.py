"""The table of faults is up to date: each fault can be planted, and its tests exist."""

import ast
import builtins
from collections import Counter
from pathlib import Path

import pytest
from faults import FAULTS, GROUPS

ROOT = Path(__file__).parents[2]


def names(tree, context):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


@pytest.mark.ci(but_each=10)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault):
    source = (ROOT / fault.file).read_text()
    assert source.count(fault.old) == 1, f"{fault.file}: expected {fault.old!r} once; follow the code, or drop {fault}"
    tree, planted = ast.parse(source), ast.parse(source.replace(fault.old, fault.new))
    assert ast.dump(planted) != ast.dump(tree)
    unknown = names(planted, ast.Load) - names(tree, ast.Load) - names(planted, ast.Store) - {*dir(builtins)}
    assert not unknown, f"{fault.name} names {unknown}: any test catches a NameError"


def test_names_are_unique_and_tests_exist():
    assert max(Counter(fault.name for fault in FAULTS).values()) == 1
    assert {fault.group for fault in FAULTS} == set(GROUPS)
    for runs in GROUPS.values():
        for run in runs:
            paths = [argument for argument in run.arguments if argument.startswith("tests/")]
            assert paths
            assert all((ROOT / path).exists() for path in paths)
