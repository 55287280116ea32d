from .._host.prefix_tree import PrefixTree
from .api import merge_attention
from .tree import prefix_tree

__all__ = ["PrefixTree", "merge_attention", "prefix_tree"]
