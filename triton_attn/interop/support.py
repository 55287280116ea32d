"""What a door to another library supports. The tables of the docs are made from it, and tests check it."""

from typing import NamedTuple


class Support(NamedTuple):
    """Each module that is a door has one, named SUPPORT.

    Attributes:
        functions: names in the module that users call.
        on_cpu: what of it runs without a GPU.
        refused: {argument or case: values that raise}; a test raises each.
    """

    functions: tuple[str, ...]
    on_cpu: str
    refused: dict[str, str]
