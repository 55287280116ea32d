"""Every family at the shapes of real models, at lengths that need a GPU, checked against fp64.

Without a GPU the same tests run in the interpreter with few tokens and heads (tests/helpers/scale.py).
"""

import attention_cases
import decode_cases
import paged_cases
import prefill_cases
import pytest
from scale import attend_by_heads


@pytest.fixture(autouse=True)
def definition_by_heads(monkeypatch):
    for cases in (attention_cases, decode_cases, paged_cases, prefill_cases):
        monkeypatch.setattr(cases, "attend", attend_by_heads)
