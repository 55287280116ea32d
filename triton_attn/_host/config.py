"""Base class of the configs of all kernels, and checks of the values that tables and users give their fields."""

import typing
from dataclasses import fields, replace

from .checks import fail

FAMILIES = {}  # {name: Config} of the families that tuned tables can have


class Config:
    """Base class of configs: frozen dataclasses of ints and bools, or of the Configs of several kernels.

    A case is what a config depends on, a NamedTuple with `arch`, `dtype` and more. A subclass defines:

        default(case)         the config of a call, from a table: nothing is timed, so equal calls run equal code
        search_space(case)    the configs that a sweep compares, the default first
        obstacle(case)        why the config cannot run, by estimate; None if it can. The compiler has the last word

    A subclass with a family can have entries in tuned tables, for cases that are `is_tuned`. `case` ({name: type}) and
    `buckets` are the fields of a case that identify an entry. `kernel` is the file of a kernel that may replace a
    portable one, which an entry is a record of.
    """

    def __init_subclass__(cls, family=None, case=None, buckets=("seqlen_k",), kernel=None):
        if family is not None:
            cls.family, cls.case_types, cls.buckets, cls.kernel = family, case, buckets, kernel
            FAMILIES[family] = cls

    @classmethod
    def types(cls):
        """{field: its types}. A field that is a Config has its class, and NoneType if it may be None."""
        return {field.name: typing.get_args(field.type) or (field.type,) for field in fields(cls)}

    @classmethod
    def from_dict(cls, values):
        parts = {name: _part(kinds) for name, kinds in cls.types().items()}
        return cls(**{name: parts[name].from_dict(x) if isinstance(x, dict) else x for name, x in values.items()})

    def with_fields(self, changes):
        """The config with new values of some fields. For a field that is a Config a dict changes some of its fields."""
        changes = dict(changes)
        for name, value in changes.items():
            if isinstance(value, dict):
                mine, part = getattr(self, name), _part(self.types()[name])
                if mine is None:
                    check_config(name, part, value, whole=True)
                changes[name] = part.from_dict(value) if mine is None else mine.with_fields(value)
        return replace(self, **changes)

    def obstacle(self, case):
        return None


def check_config(name, config, values, *, whole):
    """Raise for values that are not fields of a Config class, or that no kernel takes. whole: every field is needed."""
    types = config.types()
    if not isinstance(values, dict) or (values.keys() != types.keys() if whole else values.keys() - types.keys()):
        got = ", ".join(values) if isinstance(values, dict) else repr(values)
        fail(name, f"{'an object with' if whole else 'some of'} {', '.join(types)}", got)
    for field, value in values.items():
        part = _part(types[field])
        if part is not None and isinstance(value, dict):
            check_config(f"{name}, {field}", part, value, whole=whole)
            continue
        kinds = [kind for kind in types[field] if kind is not part]
        if type(value) not in kinds:
            known = [kind.__name__ for kind in kinds] if part is None else ["dict"] + ["None"] * len(kinds)
            fail(f"{name}, {field}", " or ".join(known), repr(value))
        _check_value(f"{name}, {field}", field, value)


def _check_value(name, field, value):
    if field.startswith("block") and not (16 <= value <= 256 and value & (value - 1) == 0):
        fail(name, "a power of two from 16 to 256", value)
    if field == "num_warps" and value not in (1, 2, 4, 8, 16):
        fail(name, "1, 2, 4, 8 or 16", value)
    if field == "tiles" and not 1 <= value <= 64:
        fail(name, "1 to 64", value)
    if field == "num_stages" and not 1 <= value <= 8:
        fail(name, "1 to 8", value)


def _part(kinds):
    """The Config among the types of a field, or None."""
    return next((kind for kind in kinds if issubclass(kind, Config)), None)
