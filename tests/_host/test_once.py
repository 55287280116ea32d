"""Checks that calls like an earlier one do not repeat."""

import weakref

import pytest
import torch

from triton_attn._host.once import check_once, sides_of, window_of


@pytest.fixture
def check():
    """A check that counts itself: it returns how often it ran."""
    runs = []

    @check_once
    def check(tensors, options):
        if "wrong" in options:
            raise ValueError("wrong")
        runs.append(tensors)
        return len(runs)

    check.runs = runs
    return check


X = torch.empty(4, 6)
OTHERS = {
    "shape": ((torch.empty(4, 7), None), (1,)),
    "strides": ((torch.empty(6, 4).mT, None), (1,)),
    "dtype": ((torch.empty(4, 6, dtype=torch.int32), None), (1,)),
    "device": ((torch.empty(4, 6, device="meta"), None), (1,)),
    "place": ((None, X), (1,)),
    "number for a tensor": ((X, 1), (1,)),
    "option": ((X, None), (2,)),
    "type of an option": ((X, None), (True,)),
    "float option": ((X, None), (1.0,)),
}


def test_a_call_that_is_alike_is_not_checked(check):
    assert check((X, None), (1,)) == check((torch.ones(4, 6), None), (1,)) == 1


@pytest.mark.parametrize("other", OTHERS)
def test_another_call_is_checked(check, other):
    check((X, None), (1,))
    assert check(*OTHERS[other]) == 2
    assert check((X, None), (1,)) == 1


def test_numbers_in_place_of_a_tensor_have_types(check):
    assert [check((x,), ()) for x in (1, True, 1.0, 1)] == [1, 2, 3, 1]


def test_errors_are_not_remembered(check):
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            check((X,), ("wrong",))


def test_what_has_no_hash_is_checked(check):
    assert check((X,), ([1],)) == 1
    assert check((X,), ([1],)) == 2


def test_no_tensor_is_held(check):
    x = torch.empty(3)
    check((x,), ())
    held = weakref.ref(x)
    check.runs.clear()
    del x
    assert held() is None


@pytest.mark.parametrize("window_size", [(-1, -1), [3, 0], (1,), (), 5, None, "ab"])
def test_a_window_is_what_it_was(window_size):
    back = window_of(list(sides_of(window_size)))
    assert type(back) is type(window_size)
    assert back == window_size
