"""The parameters of a launch: in its PTX, in the arguments of the call, and as the launcher passed them."""

import re
import struct

POINTER, TENSOR_MAP = "pointer", "128 x b8"
SIZES = {POINTER: 8, TENSOR_MAP: 128, "u64": 8, "u32": 4, "f32": 4, "u8": 1}
OF_TRITON = {  # PTX type: format of struct
    "i32": ("u32", "i"),
    "u32": ("u32", "I"),
    "i64": ("u64", "q"),
    "u64": ("u64", "Q"),
    "fp32": ("f32", "f"),
    "u1": ("u8", "?"),
    "i1": ("u8", "?"),
}
SCRATCH = [POINTER, POINTER]  # launchers append them: scratch of the kernel and of the profiler


def listed_in(ptx):
    """The type of each parameter."""
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)[1]
    found = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)( \.ptr)?[^\[,]*(?:\[(\d+)\])?", entry)
    return [POINTER if pointer else f"{count} x {kind}" if count else kind for kind, pointer, count in found]


def arguments_of(signature, values):
    """(type, bytes) of each parameter, from the compiled kernel and the arguments of the call."""
    for name, kind in signature.items():
        yield from _flat(kind, values[name])


def _flat(kind, value):
    if isinstance(kind, tuple):
        for of_item, item in zip(kind, value, strict=True):
            yield from _flat(of_item, item)
    elif kind.startswith("tensordesc") or hasattr(value, "block_shape"):
        yield TENSOR_MAP, bytes(128)
        yield from (("u32", struct.pack("i", size)) for size in value.shape)
        yield from (("u64", struct.pack("q", stride)) for stride in value.strides)
    elif kind.startswith("*"):
        yield POINTER, struct.pack("Q", value.data_ptr())
    elif kind != "constexpr":
        name, code = OF_TRITON[kind]
        yield name, struct.pack(code, value)


def compare(kernel, listed, arguments, handed):
    """Raise AssertionError unless PTX has the arguments' types followed only by scratch, and the launcher passed their
    values. `handed` are bytes, divided as in PTX. The content of tensor maps is not compared.
    """
    types = [of_argument for of_argument, _ in arguments]
    for i, (wanted, found) in enumerate(zip([*types, *SCRATCH], listed)):
        if wanted != found:
            raise AssertionError(f"{kernel}, parameter {i}: expected {wanted}, PTX has {found}")
    if len(listed) != len(types) + len(SCRATCH):
        raise AssertionError(f"{kernel}: expected {len(types)} parameters and scratch, PTX has {len(listed)}")
    for i, ((of_argument, wanted), found) in enumerate(zip(arguments, cut(handed, listed))):
        if found != wanted and of_argument != TENSOR_MAP:
            raise AssertionError(f"{kernel}, parameter {i}: expected {wanted.hex()}, got {found.hex()}")


def cut(handed, listed):
    return struct.unpack("<" + "".join(f"{SIZES[kind]}s" for kind in listed), handed)
