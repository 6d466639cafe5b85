"""The contract between training, compiler, golden model, runtime and hardware.

Standard library only. Everything that two sides must agree on is defined here once:

- :mod:`nibblecore.arch.config`: :class:`ArchConfig`, the description of a core, and its named instances;
- :mod:`nibblecore.arch.isa`: instructions as data, with encoder, decoder and disassembler;
- :mod:`nibblecore.arch.regs`: the CSR map, error causes and performance counters;
- :mod:`nibblecore.arch.numerics`: the integer arithmetic, rounding and the storage of codes.
"""
