"""Groups of layers that keep different parts of a sequence."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .._host.checks import check_int, fail


class LayerPlace(NamedTuple):
    """Where a layer's keys are: in `k_cache[cache_layer]`, on the pages of its group's block table.

    Attributes:
        group: of the layers that share a block table.
        cache_layer: which layer of the cache's tensors. Each group has one of that number, on pages of its own.
        window: keys before a query that the layer sees; -1 if all.
    """

    group: int
    cache_layer: int
    window: int


class LayerGroups(NamedTuple):
    places: tuple[LayerPlace | None, ...]  # of each layer; None where it keeps nothing
    windows: tuple[int, ...]  # of each group
    num_cache_layers: int  # that a page has room for


def group_layers(layer_windows: Sequence[int | None], num_layers: int) -> LayerGroups:
    """Groups of layers with one window each, all of one size, so that a page of any group has as many bytes.

    The size is the number of layers of the rarest window: its groups are full, and only the last group of another
    window may have fewer layers. If no window has 1.25 times as many, the size is that of the commonest, so that 10
    and 11 layers are two groups and not three. Groups whose layers see all keys come first.
    """
    kinds = _layers_by_window(layer_windows, num_layers)
    counts = sorted(map(len, kinds.values()))
    size = counts[-1] if counts[-1] < 1.25 * counts[0] else counts[0]
    places: list[LayerPlace | None] = [None] * num_layers
    windows = []
    for window in sorted(kinds, key=lambda window: window >= 0):
        layers = kinds[window]
        for start in range(0, len(layers), size):
            for index, layer in enumerate(layers[start : start + size]):
                places[layer] = LayerPlace(len(windows), index, window)
            windows.append(window)
    return LayerGroups(tuple(places), tuple(windows), size)


def _layers_by_window(layer_windows: Any, num_layers: int) -> dict[int, list[int]]:
    if not isinstance(layer_windows, Sequence) or isinstance(layer_windows, str):
        fail("layer_windows", "a list with an entry for each layer", type(layer_windows).__name__, TypeError)
    if len(layer_windows) != num_layers:
        fail("layer_windows", f"an entry for each of {num_layers} layers", len(layer_windows))
    kinds = {}
    for layer, window in enumerate(layer_windows):
        if window is not None:
            window = check_int(f"layer_windows[{layer}]", window, "an int or None")
            if window < -1:
                fail(f"layer_windows[{layer}]", "-1 (unlimited) or more, or None", window)
            kinds.setdefault(window, []).append(layer)
    if not kinds:
        fail("layer_windows", "a layer that keeps keys", "None for all layers")
    return kinds
