"""What is read from the code that the assembler made."""

from __future__ import annotations

import pytest

from benchmarks.machine_code import matrix_instructions, unwritten_in

# The whole-loop kernel at d = 64 by ptxas 12.8, as cuobjdump lists it: UR20 is the address, UR10
# was to be its copy.
FAULT = """
    /*0b40*/     ULDC.64 UR6, c[0x0][0x228] ;            /* 0x00008a0000067ab9 */
    /*1310*/     UIADD3 UR9, UR6, 0x2000, URZ ;          /* 0x0000200006097890 */
    /*13b0*/     UIADD3 UR10, UP1, UR10, 0x1, URZ ;      /* 0x000000010a0a7890 */
    /*1410*/     USHF.R.U32.HI UR20, URZ, 0x4, UR9 ;     /* 0x00000004ff147899 */
"""


def listing(*instructions: str) -> str:
    return "\n".join(f"        /*{16 * i:04x}*/    {text} ;" for i, text in enumerate(instructions))


def test_a_register_that_nothing_has_written_is_named() -> None:
    assert unwritten_in(FAULT) == "UR10 of 13b0: UIADD3 UR10, UP1, UR10, 0x1, URZ"
    assert unwritten_in(FAULT.replace("UR10, 0x1", "UR9, 0x1")) == ""


@pytest.mark.parametrize(
    ("instruction", "registers"),
    [
        ("HGMMA.64x32x16.F32.BF16 R24, R92, gdesc[UR4], RZ, !UPT, gsb0", (6, 7)),
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24", (4, 5, 6, 7)),
        ("HGMMA.64x8x16.F32.BF16 R28, R40, gdesc[UR4].tnspB, R28", (6, 7)),
        ("LDG.E.128 R24, desc[UR4][R28.64]", (4, 5)),
        ("@!P2 LDS R72, [R174+UR4]", (4,)),
        ("UIADD3 UR5, UP3, UR4, -0x3f, URZ", (4,)),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR9], idesc[UR10], UP0", range(4, 11)),
    ],
)
def test_the_registers_of_an_instruction(instruction: str, registers: tuple[int, ...]) -> None:
    writes = [f"UMOV UR{n}, 0x1" for n in registers]
    assert unwritten_in(listing(*writes, instruction)) == ""
    for n in registers:
        others = [w for w in writes if f"UR{n}," not in w]
        assert unwritten_in(listing(*others, instruction)).startswith(f"UR{n} of ")


def test_wide_results_write_their_neighbours() -> None:
    for wide, written in (("ULDC.64 UR4, c[0x0][0x228]", 2), ("UIMAD.WIDE UR4, URZ, 0x4, URZ", 2),
                          ("LDCU.128 UR4, c[0x0][0x228]", 4), ("UMOV UR4, 0x1", 1)):  # fmt: skip
        for n in range(4):
            reads = unwritten_in(listing(wide, f"UMOV UR20, UR{4 + n}"))
            assert (reads == "") == (n < written), (wide, n)


def test_matrix_instructions_by_their_dtype() -> None:
    ptx = (
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1}, %rd1, 0, 1, 1, 0;\n"
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1};\n"
        "tcgen05.mma.cta_group::1.kind::f16 [%r1];"
    )
    assert matrix_instructions(ptx) == "mma.f16 tcgen05.f16 wgmma.bf16"
    assert matrix_instructions("ret;") == "-"
