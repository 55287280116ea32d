"""Hand-written PTX of small kernels for the emulator."""


def kernel(body, threads=64, parameters=("x",)):
    """PTX of a kernel. %tid, %lane and %warp are set, %s is 4 bytes of shared memory per thread, %x.. are the
    parameters.
    """
    names = ", ".join(f".param .u64 k_{name}" for name in parameters)
    loads = "\n".join(f"ld.param.b64 %{name}, [k_{name}];" for name in parameters)
    wide = ", ".join(f"%{name}" for name in parameters)
    return f"""
.file 1 "planted.py"
.entry planted({names})
.reqntid {threads}
{{
.reg .b16 %h<10>;
.reg .b32 %tid, %lane, %warp, %s, %next, %r<40>;
.reg .f32 %f<40>;
.reg .b64 %a<20>;
.reg .b64 {wide};
.reg .pred %p<5>, %first, %second, %leader;
mov.u32 %tid, %tid.x;
and.b32 %lane, %tid, 31;
shr.u32 %warp, %tid, 5;
shl.b32 %s, %tid, 2;
add.s32 %s, %s, global_smem;
xor.b32 %next, %tid, 32;
shl.b32 %next, %next, 2;
add.s32 %next, %next, global_smem;
setp.eq.u32 %first, %warp, 0;
setp.ne.u32 %second, %warp, 0;
setp.eq.u32 %leader, %tid, 0;
{loads}
mov.b32 %r0, 7;
{numbered(body)}
ret;
}}
"""


def numbered(body):
    """Line n of the body is line n of planted.py."""
    return "\n".join(f".loc 1 {i} 0\n{line.strip()}" for i, line in enumerate(body.strip().splitlines(), 1))
