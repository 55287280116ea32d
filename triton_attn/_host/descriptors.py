"""TMA descriptors as kernel arguments."""

from triton.tools.tensor_descriptor import TensorDescriptor


def describe(base, geometry):
    """Two kernel arguments: a descriptor for each piece of the head dimension, None where there is no second.

    geometry is that of `tma_geometry`. Not one argument, a tuple: launchers before Triton 3.8 expand no descriptor in a
    tuple.
    """
    pieces = [unchecked_descriptor(TensorDescriptor, base, *of_piece) for of_piece in geometry]
    return (*pieces, None)[:2]


def unchecked_descriptor(of_class, base, shape, strides, block_shape, **more):
    """A descriptor without the checks of its constructor, a third of a call's cost: `strides_suit_tma` has made them.

    Triton 3.6 to 3.9 check a descriptor in its __post_init__ and offer no way around it.
    """
    descriptor = object.__new__(of_class)
    descriptor.__dict__.update(base=base, shape=shape, strides=strides, block_shape=block_shape, **more)
    return descriptor
