"""Decodes PTX instructions into instructions of the core, with one function for each kind.

Plain arithmetic is not here: the core has an instruction of the same name.
"""

import functools
import re

from . import core

SHARED_BASE = 1024
ELEMENTS = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 3, "e5m2": 4, "s8": 5, "u8": 6}  # asynchronous.h: Element
SUMS = {"f32": 0, "f16": 1, "s32": 2, "satfinite.s32": 3}
OPERATIONS = {name: i for i, name in enumerate(("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"))}
TYPES = {"u": 0, "b": 0, "s": 1, "f32": 2, "f64": 3, "f16": 4, "bf16": 5, "f16x2": 6, "bf16x2": 7, "f32.ftz": 8}
TENSOR_MAP_FIELDS = [
    "global_address",
    "rank",
    "box_dim",
    "global_dim",
    "global_stride",
    "element_stride",
    "elemtype",
    "interleave_layout",
    "swizzle_mode",
    "fill_mode",
]


class Unsupported(NotImplementedError):
    """An instruction that the emulator does not know; the message has the instruction and its source line."""


_DECODERS = []


@functools.lru_cache(maxsize=4096)  # a kernel has thousands of statements, of some fifty opcodes
def decoder_of(opcode):
    """(function of the body, the match and the operands; the match), or None if the core has the opcode itself."""
    for pattern, method in _DECODERS:
        if match := pattern.fullmatch(opcode):
            return method, match
    return None


def _decodes(pattern):
    def register(method):
        _DECODERS.append((re.compile(pattern), method))
        return method

    return register


def _vector(text):
    return [part.strip() for part in text.strip()[1:-1].split(",")] if text.strip().startswith("{") else [text]


_SPACE = r"(global|shared|param|local)(?:::(?:cta|cluster|entry))?"
SPACES = {"global": 0, "shared": 1, "param": 2, "local": 3}
_HINTS = r"(?:\.(?:ca|cg|cs|cv|lu|nc|wb|wt))?(?:\.L1::\w+)?(?:\.L2::\w+)*"


@_decodes(r"bra(?:\.uni)?")
def _bra(body, match, operands):
    body.program._branches.append((body.add("@bra"), body.label(operands[0])))


@_decodes(r"brx\.idx(?:\.uni)?")
def _brx(body, match, operands):
    index = body.row(operands[0])
    place, labels = body.program._targets[body.label(operands[1])]
    body.add("@brx", [index], [len(labels), place], [index])


@_decodes(r"ret|exit|trap")
def _end(body, match, operands):
    body.add("@trap" if match[0] == "trap" else "@ret")


@_decodes(r"(?:bar|barrier)(?:\.cta)?\.(sync|arrive)(\.aligned)?")
def _bar(body, match, operands):
    aligned = match[0].startswith("bar.") or match[2]
    rows = [body.row(operands[0]), body.row(operands[1]) if len(operands) > 1 else -1]
    body.add("@bar", rows, [match[1] == "sync", bool(aligned)])


@_decodes(
    r"nanosleep\.u32|setmaxnreg\.\w+\.sync\.aligned\.u32|griddepcontrol\.\w+|prefetch\S*|pmevent"
    r"|fence\.mbarrier_init\S*|fence\.proxy\.tensormap\S*|membar\.cta|fence\.\w+\.cta"
)
def _nothing(body, match, operands):
    """The emulator has registers without limit, and a program sees its own memory consistently."""
    body.add("@nothing")


@_decodes(r"membar\.(?:gl|sys)|fence(?:\.\w+)?\.(?:gpu|sys)")
def _membar(body, match, operands):
    body.add("@membar")


@_decodes(r"fence\.proxy\.async(?:\.shared::cta)?")
def _fence_proxy_async(body, match, operands):
    body.add("@fence_proxy_async")


@_decodes(r"createpolicy\S*")
def _createpolicy(body, match, operands):
    body.simple("mov.b64", body.row(operands[0], 64), body.constant(0, 64))


@_decodes(r"(?:(add|sub|mad\.lo|mad\.hi)\.cc|(?P<takes>add|sub|mad)c(?P<part>\.lo|\.hi)?(?P<leaves>\.cc)?)\.u32")
def _extended(body, match, operands):
    takes = match["takes"] is not None
    operation = ("add", "sub", "mad.lo", "mad.hi").index(match["takes"] + (match["part"] or "") if takes else match[1])
    rows = [body.row(text) for text in operands]
    body.add("@extended", rows, [operation, takes, not takes or bool(match["leaves"])], rows[1:], rows[:1])


@_decodes(r"cvt\.[us]32\.[us]64")
def _cvt_lower(body, match, operands):
    body.simple("mov.b32", body.row(operands[0]), body.row(operands[1], 64))


@_decodes(r"mov\.[busf](16|32|64)")
def _mov(body, match, operands):
    bits, (target, source) = int(match[1]), operands
    if target.startswith("{"):
        parts, whole = _vector(target), body.row(source, bits)
        for i, part in enumerate(parts):
            if part != "_":
                _mov_part(body, body.row(part, bits // len(parts)), whole, i, bits // len(parts))
    elif source.startswith("{"):
        width = bits // len(_vector(source))
        rows = [body.row(part, width) for part in _vector(source)]
        if width == 16 and bits == 64:
            halves = [body.new_rows(1), body.new_rows(1)]
            body.simple("pack.b16", halves[0], *rows[:2])
            body.simple("pack.b16", halves[1], *rows[2:])
            rows, width = halves, 32
        body.simple(f"pack.b{width}", body.row(target, bits), *rows)
    elif bits == 64 and source == "global_smem":
        body.simple("mov.b64", body.row(target, 64), body.constant(SHARED_BASE, 64))
    else:
        body.simple(f"mov.b{bits}", body.row(target, bits), body.row(source, bits))


def _mov_part(body, target, whole, i, width):
    row, place = whole + i * width // 32, i * width % 32
    if width == 32:
        body.simple("mov.b32", target, row)
    elif width == 16:
        body.simple("unpack.high.b16" if place else "cvt.u16.u32", target, row)
    else:
        body.simple("bfe.u32", target, row, body.constant(place, 32), body.constant(width, 32))


@_decodes(r"cvta(?:\.to)?\.param\.u64")
def _cvta_param(body, match, operands):
    base = body.row("%parameters", 64) if "%parameters" in body.program._bits else None
    if base is None:
        body.program._bits["%parameters"] = 64
        base = body.row("%parameters", 64)
    body.simple("add.s64", body.row(operands[0], 64), body.row(operands[1], 64), base)


def _order(order, space):
    """instructions.h: Order"""
    return {"relaxed": 1, "volatile": 1, "acquire": 2, "release": 3}.get(order, 0) if space == "global" else 0


@_decodes(
    rf"ld(?:\.(relaxed|acquire|volatile|weak))?(?:\.(?:gpu|sys|cta))?\.{_SPACE}{_HINTS}(?:\.v(\d))?\.([busf])(8|16|32|64)"
)
def _ld(body, match, operands):
    order, space, _, kind, bits = match.groups()
    vector = _vector(operands[0])
    wide = any(body.bits(part) == 64 for part in vector)
    rows = [body.row(part, 64 if wide else 32) for part in vector]
    row, offset, wide_address = body.address(operands[1])
    m = [offset, int(bits) // 8, SPACES[space], wide_address, kind == "s", wide, _order(order, space)]
    defs = [r + i for r in rows if r >= 0 for i in range(2 if wide else 1)]
    body.add("@ld", [row, *rows], m, [row, row + 1][: 1 + wide_address], defs)


@_decodes(
    rf"st(?:\.(relaxed|release|volatile|weak))?(?:\.(?:gpu|sys|cta))?\.{_SPACE}{_HINTS}(?:\.v(\d))?\.([busf])(8|16|32|64)"
)
def _st(body, match, operands):
    order, space, _, _, bits = match.groups()
    if space == "param":
        raise Unsupported("a store to parameters")
    vector = _vector(operands[1])
    wide = int(bits) == 64 or any(body.bits(part) == 64 for part in vector)
    rows = [body.row(part, 64 if wide else 32) for part in vector]
    row, offset, wide_address = body.address(operands[0])
    data = [r + i for r in rows for i in range(2 if wide else 1)]
    if space == "shared" and not wide_address:
        # Unwritten bytes may be stored to shared memory: the address is none of them, so it stays out of the moves.
        body.add("@st", [row, *rows], [offset, int(bits) // 8, 1, False, False, wide], data)
    else:
        uses = [row, row + 1][: 1 + wide_address] + data
        name = "@st" if space == "shared" else "@st_global"
        m = [offset, int(bits) // 8, SPACES[space], wide_address, False, wide, _order(order, space)]
        body.add(name, [row, *rows], m, uses)


@_decodes(
    rf"(?P<name>atom|red)(?:\.{_SPACE}|\.(?P<order>relaxed|acquire|release|acq_rel)|\.(?:cta|gpu|sys|cluster))*"
    r"\.(?P<operation>add|min|max|and|or|xor|exch|cas|inc|dec)(?:\.noftz)?(?:\.v\d)?\.(?P<type>[busf]\w+)"
)
def _atom(body, match, operands):
    atom, order, operation, type_ = match["name"], match["order"], match["operation"], match["type"]
    bits = {"f16x2": 32, "bf16x2": 32}.get(type_) or int(re.sub(r"\D", "", type_))
    flushes = type_ == "f32" and operation == "add" and ".shared" not in match[0]  # subnormal numbers, in global memory
    kind = TYPES["f32.ftz"] if flushes else TYPES.get(type_, TYPES.get(type_[0]))
    target = _vector(operands.pop(0)) if atom == "atom" else None
    row, offset, wide_address = body.address(operands[0])
    values = _vector(operands[-1])
    compared = _vector(operands[1]) if operation == "cas" else ["_"] * len(values)
    triples = [
        body.row(x, 64 if bits == 64 and x != "_" else 32)
        for three in zip(values, compared, target or ["_"] * len(values))
        for x in three
    ]
    m = [offset, bits // 8, ".shared" in match[0], wide_address, OPERATIONS[operation], kind]
    m += [order in ("acquire", "acq_rel"), order in ("release", "acq_rel")]
    spread = [[r + i for r in triples[k::3] if r >= 0 for i in range(2 if bits == 64 else 1)] for k in range(3)]
    body.add("@atom", [row, *triples], m, [row, row + 1][: 1 + wide_address] + spread[0] + spread[1], spread[2])


@_decodes(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _matrix(body, match, operands):
    stores = match[1] == "st"
    address, registers = operands if stores else operands[::-1]
    row, offset, _ = body.address(address)
    rows = [body.row(part) for part in _vector(registers)]
    uses, defs = ([row, *rows], []) if stores else ([row], rows)
    body.add("@matrix", [row, *rows], [offset, bool(match[3]), stores], uses, defs)


@_decodes(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.(f32|f16|s32|satfinite\.s32)\.(\w+)\.(\w+)\.(?:f32|f16|s32)")
def _mma(body, match, operands):
    depth, sums, a_type, b_type = match.groups()
    if a_type != b_type or a_type not in ELEMENTS:
        raise Unsupported(f"mma of {a_type} and {b_type}")
    d, a, b, c = ([body.row(part) for part in _vector(text)] for text in operands)
    m = [ELEMENTS[a_type], int(depth), len(a), len(b), SUMS[sums], len(d)]
    body.add("@mma", d + a + b + c, m, a + b + c, d)


@_decodes(r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned")
def _wgmma_order(body, match, operands):
    name = {"fence": "@wgmma_fence", "commit_group": "@wgmma_commit", "wait_group": "@wgmma_wait"}[match[1]]
    body.add(name, m=[int(operands[0], 0)] if operands else [])


@_decodes(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k\d+\.(f32|s32|satfinite\.s32)\.(\w+)\.(\w+)")
def _wgmma(body, match, operands):
    columns, sums, a_type, b_type = match.groups()
    if a_type != b_type or a_type not in ELEMENTS:
        raise Unsupported(f"wgmma of {a_type} and {b_type}")
    d = [body.row(part) for part in _vector(operands[0])]
    shared = not operands[1].startswith("{")
    a = [body.row(operands[1], 64)] if shared else [body.row(part) for part in _vector(operands[1])]
    b = body.row(operands[2], 64)
    scale = operands[3] if len(operands) > 3 else "1"
    add = body.predicate(scale) if body.bits(scale.removeprefix("!")) else -2 if int(scale, 0) else -1
    rest = [int(x, 0) for x in operands[4:]]
    signs, transposed = (rest[:2] or [1, 1]), rest[2:]
    a_transposed, b_transposed = ([0] * (2 - len(transposed)) + transposed) if transposed else [0, 0]
    m = [int(columns), ELEMENTS[a_type] | SUMS[sums] << 8, shared, a_transposed, b_transposed, *signs, add]
    body.add("@wgmma", [*d, *a, b], m, [*a, *([a[0] + 1] if shared else []), b, b + 1])


@_decodes(rf"cp\.async\.(?:ca|cg)\.shared(?:::cta)?\.global{_HINTS}")
def _cp_async(body, match, operands):
    target, target_offset, _ = body.address(operands[0])
    source, source_offset, _ = body.address(operands[1])
    read = body.row(operands[3]) if len(operands) > 3 and body.bits(operands[3]) != 64 else -1
    uses = [target, source, source + 1, *([read] if read >= 0 else [])]
    body.add("@cp_async", [target, source, read], [target_offset, source_offset, int(operands[2], 0)], uses)


@_decodes(r"cp\.async\.(commit_group|wait_group|wait_all)")
def _cp_order(body, match, operands):
    if match[1] == "commit_group":
        body.add("@cp_commit")
    else:
        body.add("@cp_wait", m=[int(operands[0], 0) if operands else -1])


@_decodes(r"cp\.async\.bulk\.(commit_group|wait_group(?:\.read)?)")
def _bulk_order(body, match, operands):
    if match[1] == "commit_group":
        body.add("@bulk_commit")
    else:
        body.add("@bulk_wait", m=[int(operands[0], 0)])


@_decodes(
    r"cp\.async\.bulk\.tensor\.\dd\.shared::(?:cluster|cta)\.global(?:\.tile)?\.mbarrier::complete_tx::bytes"
    r"(?:\.L2::cache_hint)?"
)
def _tensor_load(body, match, operands):
    shared, offset, _ = body.address(operands[0])
    barrier, barrier_offset, _ = body.address(operands[2])
    if barrier_offset:
        raise Unsupported("an mbarrier at an offset")
    _tensor_copy(body, shared, offset, operands[1], barrier, adds=False)


@_decodes(
    r"cp\.(reduce\.)?async\.bulk\.tensor\.\dd\.global\.shared::cta(\.add)?(?:\.tile)?\.bulk_group(?:\.L2::cache_hint)?"
)
def _tensor_store(body, match, operands):
    if bool(match[1]) != bool(match[2]):
        raise Unsupported("a reduction that is no sum")
    shared, offset, _ = body.address(operands[1])
    _tensor_copy(body, shared, offset, operands[0], -1, adds=bool(match[1]))


def _tensor_copy(body, shared, offset, tensor, barrier, adds):
    match = re.fullmatch(r"\[\s*([\w$%]+)\s*,\s*\{(.*)\}\s*\]", tensor)
    if not match:
        raise Unsupported(f"tensor {tensor}")
    tensor_map, coordinates = body.row(match[1], 64), [body.row(part) for part in match[2].split(",")]
    uses = [shared, tensor_map, tensor_map + 1, *coordinates, *([barrier] if barrier >= 0 else [])]
    body.add("@tensor_copy", [shared, tensor_map, barrier, *coordinates], [adds, offset], uses)


@_decodes(r"mbarrier\.(init|inval)\.shared(?:::cta)?\.b64")
def _mbarrier_life(body, match, operands):
    row, offset, _ = body.address(operands[0])
    count = [body.row(operands[1])] if match[1] == "init" else []
    body.add(f"@mbarrier_{match[1]}", [row, *count], [offset], [row, *count])


@_decodes(
    r"mbarrier\.(?:(arrive\.expect_tx|arrive)(?:\.release\.cta)?|(expect_tx)(?:\.relaxed\.cta)?)\.shared(?:::cta)?\.b64"
)
def _mbarrier_arrive(body, match, operands):
    if not operands[0].startswith("["):
        if operands[0] != "_":
            raise Unsupported("the state of an mbarrier as a value")
        operands = operands[1:]
    row, offset, _ = body.address(operands[0])
    value = body.row(operands[1]) if len(operands) > 1 else -1
    count, size = (-1, value) if "expect_tx" in match[0] else (value, -1)
    uses = [row, *([value] if value >= 0 else [])]
    body.add("@mbarrier_arrive", [row, count, size], [offset, 0, match[1] is not None], uses)


@_decodes(r"mbarrier\.(?:try_wait|test_wait)\.parity(?:\.acquire\.cta)?\.shared(?:::cta)?\.b64")
def _mbarrier_wait(body, match, operands):
    row, offset, _ = body.address(operands[1])
    parity = body.row(operands[2])
    body.add("@mbarrier_try_wait", [row, -1, -1, parity], [offset, body.predicate(operands[0])], [row, parity])


@_decodes(r"tensormap\.replace\.tile\.(\w+)\.(global|shared::cta)\.b1024\.b(32|64)")
def _tensormap_replace(body, match, operands):
    field = TENSOR_MAP_FIELDS.index(match[1])
    row, offset, wide_address = body.address(operands[0])
    index, value = int(operands[1], 0) if len(operands) == 3 else 0, operands[-1]
    wide, is_register = match[3] == "64", body.bits(value) is not None
    rows = [body.row(value, int(match[3]))] if is_register else []
    m = [offset, match[2] != "global", wide_address, field, index, 0 if is_register else int(value, 0), wide]
    uses = [row, row + 1][: 1 + wide_address] + [r + i for r in rows for i in range(1 + wide)]
    body.add("@tensormap_replace", [row, *rows], m, uses)


@_decodes(r"tensormap\.cp_fenceproxy\.global\.shared::cta\.\S+")
def _tensormap_copy(body, match, operands):
    target, source = body.address(operands[0]), body.address(operands[1])
    body.add("@tensormap_copy", [target[0], source[0]], uses=[target[0], target[0] + 1, source[0]])


@_decodes(r"bar\.warp\.sync")
def _warp_sync(body, match, operands):
    members = body.row(operands[0])
    body.add("@warp_sync", [members], uses=[members])


@_decodes(r"elect\.sync")
def _elect(body, match, operands):
    leader, predicate = operands[0].split("|")
    rows = [body.row(leader), body.row(operands[1])]
    body.add("@elect", rows, [body.predicate(predicate)], [rows[1]], [rows[0]])


@_decodes(r"activemask\.b32")
def _activemask(body, match, operands):
    row = body.row(operands[0])
    body.add("@activemask", [row], defs=[row])


@_decodes(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def _shfl(body, match, operands):
    target, _, predicate = operands[0].partition("|")
    rows = [body.row(text) for text in (target, *operands[1:])]
    m = [("up", "down", "bfly", "idx").index(match[1]), body.predicate(predicate) if predicate else -1]
    body.add("@shfl", rows, m, rows[1:], rows[:1])


@_decodes(r"vote\.sync\.(ballot|any|all)\.(?:b32|pred)")
def _vote(body, match, operands):
    ballot = match[1] == "ballot"
    members, rows = body.row(operands[2]), [body.row(operands[0])] if ballot else []
    m = [("ballot", "any", "all").index(match[1]), -1 if ballot else body.predicate(operands[0])]
    source = operands[1].strip()
    m += [body.predicate(source.removeprefix("!")), source.startswith("!")]
    body.add("@vote", [members, *rows], m, [members], rows)


@_decodes(r"redux\.sync\.(add|min|max|and|or|xor)\.([bus])32")
def _redux(body, match, operands):
    rows = [body.row(text) for text in operands]
    body.add("@redux", rows, [OPERATIONS[match[1]], match[2] == "s"], rows[1:], rows[:1])


@_decodes(r"setp\.(\w+)\.(and|or|xor)\.((?:ftz\.)?\w+)")
def _setp_combined(body, match, operands):
    compared = body.new_predicate()
    opcode = f"setp.{match[1]}.{match[3]}"
    if opcode not in core.entries():
        raise Unsupported(f"instruction {opcode}")
    signature = core.entries()[opcode][1]
    body.simple(opcode, compared, *(body.operand(text, letter) for text, letter in zip(operands[1:3], signature[1:])))
    body.simple(f"{match[2]}.pred", body.predicate(operands[0]), compared, body.predicate(operands[3]))


@_decodes(r"fence\.proxy\.(?!async|tensormap)\S+|tcgen05\S*|barrier\.cluster\S*|mapa\S*|clusterlaunchcontrol\S*")
def _of_other_targets(body, match, operands):
    raise Unsupported(f"instruction {match[0]} (clusters and tcgen05 are not emulated)")
