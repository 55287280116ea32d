"""Listings in the format of `nvdisasm -c -hex`, from short descriptions."""


def listing(lines, name="kernel"):
    """`lines`: "label:" or an instruction, with its stall count after a bar: "@!P0 BRA `(.L_x_1) | 5"."""
    text, address = [f".text.{name}:"], 0
    for line in lines.strip().splitlines():
        line = line.strip()
        if line.endswith(":"):
            text.append(line)
            continue
        instruction, _, stall = line.partition("|")
        control = int(stall or 1) << 41
        text.append(f"        /*{address:04x}*/                   {instruction.strip()} ;   /* 0x{0:016x} */")
        text.append(f"                                        /* 0x{control:016x} */")
        address += 16
    return "\n".join(text)
