"""What is known of calls like an earlier one: their checks and plans."""

import threading
import weakref

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from triton_attn._host import tuned
from triton_attn._host.known import Known, check_once, sides_of, window_of


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
    "shape": ((torch.empty(5, 6), None), (1,)),
    "strides": ((torch.empty(6, 4).mT, None), (1,)),
    "dtype": ((torch.empty(4, 6, dtype=torch.int32), None), (1,)),
    "device": ((torch.empty(4, 6, device="meta"), None), (1,)),
    "place": ((None, X), (1,)),
    "gradient": ((torch.empty(4, 6, requires_grad=True), None), (1,)),
    "number for a tensor": ((X, 1), (1,)),
    "option": ((X, None), (2,)),
    "type of an option": ((X, None), (True,)),
    "float option": ((X, None), (1.0,)),
    "dtype for a tensor": ((X, torch.int8), (1,)),
    "another dtype for a tensor": ((X, torch.int16), (1,)),
    "float for a tensor": ((X, 1.0), (1,)),
}


def test_a_call_that_is_alike_is_not_checked(check):
    assert check((X, None), (1,)) == check((torch.ones(4, 6), None), (1,)) == 1


@pytest.mark.parametrize("other", OTHERS)
def test_another_call_is_checked(check, other):
    check((X, None), (1,))
    assert check(*OTHERS[other]) == 2
    assert check((X, None), (1,)) == 1
    assert check(*OTHERS[other]) == 2


def test_every_call_differs_from_every_other(check):
    assert [check(*other) for other in OTHERS.values()] == [*range(1, len(OTHERS) + 1)]


def test_numbers_in_place_of_a_tensor_have_types(check):
    assert [check((x,), ()) for x in (1, True, np.True_, 1.0, 2, 1)] == [1, 2, 3, 4, 5, 1]


def test_the_value_of_a_scale_does_not_count(check):
    """It is checked at each call: a number per layer would fill the memory."""
    assert [check((x,), ()) for x in (1.0, 0.5, np.float32(1), np.float32(2))] == [1, 1, 2, 2]


def test_a_gradient_that_is_not_recorded_does_not_count(check):
    x = torch.empty(4, 6, requires_grad=True)
    with torch.no_grad():
        assert check((x,), ()) == check((X,), ()) == 1
    assert check((x,), ()) == 2


def test_errors_are_not_remembered(check):
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            check((X,), ("wrong",))


def test_what_has_no_hash_is_checked(check):
    assert check((X,), ([1],)) == 1
    assert check((X,), ([1],)) == 2


class Own(torch.Tensor):
    pass


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_tensors_of_another_class_are_checked(check):
    x = X.as_subclass(Own)
    assert [check((each,), ()) for each in (x, x, X, x, X)] == [1, 2, 3, 4, 3]
    assert check((torch.nn.Parameter(X, requires_grad=False),), ()) == 3


def test_an_observed_call_is_checked(check):
    """Nothing is known of it, and nothing known is used."""
    assert check((X,), ()) == 1
    with Mode():
        assert check((X,), ()) == 2
    with forward_ad.dual_level():
        assert check((X,), ()) == 3
    torch.vmap(lambda x: x + check((X,), ()))(X)
    assert check((X,), ()) == 1
    assert check((X,), ("only seen",)) == 5
    with Mode():
        check((X,), ("new",))
    assert check((X,), ("new",)) == 7


def test_a_traced_call_is_checked(monkeypatch, check):
    assert check((X,), ()) == 1
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert check((X,), ()) == 2


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(Known, "most", 8)
    known = Known()
    for i in range(100):
        key, plan = known.find((X,), (i,))
        assert plan is None
        known.keep(key, f"plan {i}")
        assert known.find((X,), (i,))[1] == f"plan {i}"
        assert len(known._results) <= 8


def test_another_table_is_another_call(check):
    """Plans may hold configs."""
    assert check((X,), ()) == 1
    tuned.forget_plans()
    assert check((X,), ()) == 2


def test_a_plan_made_while_tables_changed_is_not_found_later():
    known = Known()
    key, _ = known.find((X,))
    tuned.forget_plans()
    known.keep(key, "of the old tables")
    assert known.find((X,))[1] is None


def test_no_plan_is_not_kept():
    known = Known()
    key, plan = known.find((X,))
    assert plan is None
    known.keep(key, None)
    assert not known._results


def test_threads_share_what_is_known(check):
    threads = [threading.Thread(target=lambda: [check((X,), (i % 7,)) for i in range(300)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(check.runs) <= 4 * 7


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
