from nibblecore.arch import regs


def test_offsets_are_unique_aligned_and_inside_the_window() -> None:
    offsets = [r.offset for r in regs.REGISTERS.values()]
    assert len(set(offsets)) == len(offsets)
    assert all(o % 4 == 0 and o < 1 << regs.CSR_ADDR_BITS for o in offsets)


def test_fields_do_not_overlap() -> None:
    for register in regs.REGISTERS.values():
        used = 0
        for f in register.fields:
            mask = (1 << f.bits) - 1 << f.low
            assert not used & mask, f"{register.name}.{f.name}"
            assert mask < 1 << 32
            used |= mask


def test_extract() -> None:
    assert regs.extract("ERROR", "unit", 0x0403) == 4
    assert regs.extract("ERROR", "cause", 0x0403) == 3
