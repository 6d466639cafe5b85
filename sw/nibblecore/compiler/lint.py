"""The linter: proves a program free of races, deadlocks, foreign addresses and reads of unwritten words.

It works on the finished program alone and shares no code with the emitter. What it proves holds for every timing of
engines, memory and bus:

* *Deadlock.* Engines, queues and semaphores have one producer and one consumer each, so no move ever disables another
  and every maximal execution executes the same instructions. One of them decides.
* *Races.* The n-th wait of one engine for another takes the token of the n-th signal. Instruction ``a`` happens before
  ``b`` if a chain of program order and such tokens leads from the end of ``a`` to the start of ``b``; nothing else
  counts, no queue depth and no duration. Every two conflicting accesses of different engines must be ordered so.
* *Unwritten words.* In a race-free program all executions read the same values, so one decides here too.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from ..arch.config import ArchConfig
from ..arch.isa import Engine, Instruction, Opcode, Region, disassemble, encode, engines_in
from ..errors import EncodingError, LintError
from ..runtime.layout import tensor_words

if TYPE_CHECKING:
    from ..runtime.program import Program

Index = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]

_WRAP: Final = 0x10000
_WRITABLE: Final = (Region.SCRATCH, Region.OUTPUT)
_MESSAGES_PER_INSTRUCTION: Final = 4


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing wrong with a program; ``index`` is the instruction's, or -1."""

    kind: str
    index: int
    text: str

    def __str__(self) -> str:
        return self.text


def check(program: "Program") -> None:
    """Raise :class:`LintError` with all findings; return if there are none."""
    findings = lint(program)
    if findings:
        lines = [str(f) for f in findings]
        raise LintError("\n".join(lines))


def lint(program: "Program") -> list[Finding]:
    """All findings, in the order of an execution. Kinds: encoding, bounds, deadlock, token, race, unwritten, output."""
    return _Linter(program).run()


@dataclasses.dataclass
class _Touch:
    """Words of one memory; ``parts`` are the parts of a word that are touched, one bit each."""

    memory: str
    words: Index
    write: bool
    parts: int = 0xFF
    what: str = ""


@functools.lru_cache(maxsize=1024)
def _valid(
    start: int, count: int, kernel: int, stride: int, dilation: int, size: int, out_step: int, tap_step: int
) -> Index:
    """Distinct address offsets of one axis, of those (output, tap) pairs that lie in ``0..size-1``."""
    out, tap = np.meshgrid(np.arange(count), np.arange(kernel), indexing="ij")
    at = start + out * stride + tap * dilation
    inside = np.logical_and(at >= 0, at < size)
    return np.array(sorted(set((out * out_step + tap * tap_step)[inside].tolist())), np.int64)


class _Linter:
    def __init__(self, program: "Program") -> None:
        self.program = program
        self.arch: ArchConfig = program.arch
        self.code = list(program.instructions)
        self.findings: list[Finding] = []

    def report(self, kind: str, index: int, text: str) -> None:
        if index >= 0:
            if sum(f.index == index for f in self.findings[-_MESSAGES_PER_INSTRUCTION:]) >= _MESSAGES_PER_INSTRUCTION:
                return
            text = f"instruction {index} ({disassemble(self.code[index])}) {text}"
        self.findings.append(Finding(kind, index, text))

    def run(self) -> list[Finding]:
        if not self._encodings():
            return self.findings
        order = self._execute()
        self._memory(order)
        return self.findings

    # Encoding --------------------------------------------------------------------------------------------------

    def _encodings(self) -> bool:
        for index, i in enumerate(self.code):
            try:
                encode(i)
            except EncodingError as error:
                self.findings.append(Finding("encoding", index, f"instruction {index}: {error}"))
        ends = [index for index, i in enumerate(self.code) if i.opcode is Opcode.END]
        if ends != [len(self.code) - 1]:
            self.report("encoding", -1, f"END must be the last instruction and nowhere else; it stands at {ends}")
        return not self.findings

    # Deadlock --------------------------------------------------------------------------------------------------

    def _execute(self) -> list[tuple[int, list[int]]]:
        """One maximal execution: indices in order of their start, with the instructions done before it.

        The second item counts, per engine, how many of its instructions are done whenever this one starts.
        """
        queues: list[deque[int]] = [deque() for _ in Engine]
        held: list[int | None] = [None] * len(Engine)  # executed, waiting to signal
        tokens: dict[tuple[int, int], deque[list[int]]] = {(a, b): deque() for a in Engine for b in Engine}
        full = (1 << self.arch.semaphore_bits) - 1
        known = [[0] * len(Engine) for _ in Engine]
        executed = [0] * len(Engine)
        order: list[tuple[int, list[int]]] = []
        fetched, moved = 0, True
        while moved:
            moved = False
            while self.code[fetched].opcode is not Opcode.END:
                engine = self.code[fetched].engine
                assert engine is not None
                is_free = len(queues[engine]) < self.arch.queue_depth
                if self.arch.sequential:
                    is_free = not any(queues) and all(h is None for h in held)
                if not is_free:
                    break
                queues[engine].append(fetched)
                fetched, moved = fetched + 1, True
            for e in Engine:
                while True:
                    index = held[e]
                    if index is not None:
                        targets = engines_in(self.code[index]["signal"])
                        if any(len(tokens[e, t]) >= full for t in targets):
                            break
                        at_end = known[e].copy()
                        at_end[e] = executed[e]
                        for t in targets:
                            tokens[e, t].append(at_end)
                        held[e], moved = None, True
                    if not queues[e]:
                        break
                    sources = engines_in(self.code[queues[e][0]]["wait"])
                    if not all(tokens[s, e] for s in sources):
                        break
                    index = queues[e].popleft()
                    for s in sources:
                        known[e] = [max(a, b) for a, b in zip(known[e], tokens[s, e].popleft(), strict=True)]
                    order.append((index, known[e]))
                    executed[e] += 1
                    held[e], moved = index, True
        self._stuck(queues, held, tokens, fetched)
        return order

    def _stuck(
        self,
        queues: list[deque[int]],
        held: list[int | None],
        tokens: dict[tuple[int, int], deque[list[int]]],
        fetched: int,
    ) -> None:
        blocked = False
        for e in Engine:
            index = held[e]
            if index is not None:
                blocked = True
                self.report("deadlock", index, "never ends: a semaphore that it signals stays full")
            elif queues[e]:
                blocked = True
                index = queues[e][0]
                missing = [s.name for s in engines_in(self.code[index]["wait"]) if not tokens[s, e]]
                self.report("deadlock", index, f"never starts: it waits for {', '.join(missing)}")
        if blocked and self.code[fetched].opcode is not Opcode.END:
            self.report("deadlock", fetched, "is never fetched: the queue of its engine stays full")
        if not blocked:
            for (a, b), left in tokens.items():
                if left:
                    self.report(
                        "token",
                        -1,
                        f"{len(left)} signals from {Engine(a).name} to {Engine(b).name} are never waited for",
                    )

    # Memory ----------------------------------------------------------------------------------------------------

    def _memory(self, order: list[tuple[int, list[int]]]) -> None:
        arch, program = self.arch, self.program
        self.sizes = {
            "the activation buffer": arch.act_depth,
            "the weight buffer": arch.weight_depth,
            "the accumulators": 2 * arch.acc_depth,
        }
        for region, size in program.region_sizes.items():
            self.sizes[f"region {region.name}"] = size // arch.word_bytes
        written = {name: np.zeros(size, np.uint8) for name, size in self.sizes.items()}
        initial = {Region.CONSTANTS: len(program.constants) // arch.word_bytes}
        written["region CONSTANTS"][: initial[Region.CONSTANTS]] = 0xFF
        for binding in program.inputs:
            end = binding.offset_words + tensor_words(binding.shape, binding.bits, arch.lanes)
            written[f"region {binding.region.name}"][binding.offset_words : end] = 0xFF
        # Per memory and engine: number of the engine's last instruction that wrote, and read, each word; 0: none.
        writes: dict[tuple[str, Engine], npt.NDArray[np.int32]] = {}
        reads: dict[tuple[str, Engine], npt.NDArray[np.int32]] = {}
        numbers = [0] * len(Engine)
        indices: list[list[int]] = [[] for _ in Engine]
        for index, known in order:
            i = self.code[index]
            e = i.engine
            assert e is not None
            numbers[e] += 1
            indices[e].append(index)
            touches = list(self._touches(index, i))
            for t in touches:
                if not t.write:
                    self._check_written(index, t, written[t.memory])
                for other in Engine:
                    if other is e:
                        continue
                    tables = [(writes, "writes")] + ([(reads, "reads")] if t.write else [])
                    for table, verb in tables:
                        last = table.get((t.memory, other))
                        if last is None:
                            continue
                        bad = last[t.words] > known[other]
                        if bad.any():
                            word = int(t.words[bad][0])
                            self.report("race", index, self._race(t, word, indices[other][int(last[word]) - 1], verb))
            for t in touches:
                table = writes if t.write else reads
                if (t.memory, e) not in table:
                    table[t.memory, e] = np.zeros(self.sizes[t.memory], np.int32)
                table[t.memory, e][t.words] = numbers[e]
                if t.write:
                    written[t.memory][t.words] |= t.parts
        for binding in (*program.outputs, *program.tensors):
            span = written[f"region {binding.region.name}"][binding.offset_words :]
            words = span[: tensor_words(binding.shape, binding.bits, arch.lanes)]
            missing = np.flatnonzero(words != 0xFF)
            if missing.size:
                self.report(
                    "output", -1,
                    f"{missing.size} words of tensor {binding.name!r} are never written, the first is {missing[0]}",
                )  # fmt: skip

    def _race(self, t: _Touch, word: int, rival: int, verb: str) -> str:
        return (
            f"{'writes' if t.write else 'reads'} word {word} of {t.memory}, which instruction {rival} "
            f"({disassemble(self.code[rival])}) {verb} without being ordered before"
        )

    def _check_written(self, index: int, t: _Touch, written: Bits) -> None:
        bad = (written[t.words] & t.parts) != t.parts
        if bad.any():
            self.report(
                "unwritten", index, f"reads word {int(t.words[bad][0])} of {t.memory}{t.what}, which nobody has written"
            )

    # Addresses -------------------------------------------------------------------------------------------------

    def _touches(self, index: int, i: Instruction) -> Iterator[_Touch]:
        if i.opcode in (Opcode.LOAD, Opcode.STORE):
            yield from self._dma(index, i)
        elif i.opcode is Opcode.MAC:
            yield from self._mac(index, i)
        elif i.opcode is Opcode.POST:
            yield from self._post(index, i)
        else:
            yield from self._pool(index, i)

    def _act(self, index: int, addresses: Index) -> Index:
        """Addresses of the activation buffer; nothing that the compiler emits wraps around its end."""
        flat = np.asarray(addresses).reshape(-1) % _WRAP
        if flat.size and int(flat.max()) >= self.arch.act_depth:
            self.report(
                "bounds", index, f"reaches word {int(flat.max())} of the activation buffer of {self.arch.act_depth}"
            )
        return flat % self.arch.act_depth

    def _dma(self, index: int, i: Instruction) -> Iterator[_Touch]:
        load = i.opcode is Opcode.LOAD
        plane = np.arange(i["count2"]).reshape(-1, 1, 1)
        row = np.arange(i["count1"]).reshape(1, -1, 1)
        word = np.arange(i["count0"]).reshape(1, 1, -1)
        dram = (i["dram_addr"] + plane * i["dram_step2"] + row * i["dram_step1"] + word).reshape(-1)
        local = (i["local_addr"] + plane * i["local_step2"] + row * i["local_step1"] + word).reshape(-1)
        memory = f"region {Region(i['region']).name}" if i["region"] in list(Region) else f"region {i['region']}"
        size = self.sizes.get(memory, 0)
        if int(dram.max()) >= size:
            self.report("bounds", index, f"reaches word {int(dram.max())} of {memory}, which has {size} words")
            dram = dram[dram < size]
        if not load and i["region"] not in _WRITABLE:
            self.report("bounds", index, f"writes to {memory}")
        if memory in self.sizes:
            yield _Touch(memory, dram, not load)
        if load and i["target"] == 1:
            depth = self.arch.weight_depth
            if local.size > depth:
                self.report("bounds", index, f"loads {local.size} words into the weight buffer of {depth}")
            yield _Touch("the weight buffer", local % _WRAP % depth, True)
        else:
            yield _Touch("the activation buffer", self._act(index, local), load)

    def _tile(self, index: int, i: Instruction) -> Index:
        pixels = i["rows"] * i["cols"]
        if pixels > self.arch.acc_depth:
            self.report("bounds", index, f"has a tile of {pixels} pixels; the accumulators hold {self.arch.acc_depth}")
        return i["acc_bank"] * self.arch.acc_depth + np.arange(min(pixels, self.arch.acc_depth))

    @staticmethod
    def _taps(i: Instruction) -> Index:
        """Address offsets of all valid taps of all pixels."""
        y, x = (
            _valid(i[start], i[count], i[f"kernel_{a}"], i[f"stride_{a}"], i[f"dilation_{a}"], i[size],
                   i[f"o{a}_step"], i[f"k{a}_step"])
            for a, start, count, size in (("y", "y0", "rows", "height"), ("x", "x0", "cols", "width"))
        )  # fmt: skip
        return np.add.outer(y, x).reshape(-1)

    def _mac(self, index: int, i: Instruction) -> Iterator[_Touch]:
        taps = self._taps(i)
        bricks = np.arange(i["bricks"]) * i["brick_step"]
        yield _Touch("the activation buffer", self._act(index, i["x_addr"] + np.add.outer(taps, bricks)), False)
        passes = i["kernel_y"] * i["kernel_x"] * i["bricks"]
        tiles = np.add.outer(np.arange(passes if i["w_step"] else 1) * i["w_step"], np.arange(self.arch.columns))
        yield _Touch("the weight buffer", (i["w_addr"] + tiles.reshape(-1)) % _WRAP % self.arch.weight_depth, False)
        tile = self._tile(index, i)
        if i["accumulate"]:
            yield _Touch("the accumulators", tile, False)
        yield _Touch("the accumulators", tile, True)

    def _post(self, index: int, i: Instruction) -> Iterator[_Touch]:
        arch = self.arch
        if i["bricks"] > arch.bricks_per_tile or i["part"] >= arch.parts_per_brick:
            self.report(
                "bounds", index,
                f"writes {i['bricks']} bricks, part {i['part']}; a column tile has {arch.bricks_per_tile} bricks "
                f"and a brick {arch.parts_per_brick} parts",
            )  # fmt: skip
        yield _Touch("the accumulators", self._tile(index, i), False)
        records = (i["p_addr"] + np.arange(arch.param_words)) % _WRAP % arch.weight_depth
        yield _Touch("the weight buffer", records, False)
        parts = 0xFF if arch.parts_per_brick == 1 else 1 << i["part"] % 8
        if arch.parts_per_brick < 8 and i["part"] == arch.parts_per_brick - 1:
            parts |= 0xFF & ~((1 << arch.parts_per_brick) - 1)  # the mask's spare bits belong to the last part
        if i["add"]:
            words = np.arange(i["bricks"] * (1 + i["add_wide"]))
            yield _Touch(
                "the activation buffer", self._act(index, self._pixels(i, "add", words)), False, parts, " (operand)"
            )
        if i["mode"] == 2:
            per_part = 8 * i["bricks"] if arch.parts_per_brick == 1 else 8 // arch.parts_per_brick
            words, parts = np.arange(per_part) + (i["part"] * per_part if arch.parts_per_brick > 1 else 0), 0xFF
        else:
            words = np.arange(i["bricks"] * (1 + i["mode"]))
        yield _Touch("the activation buffer", self._act(index, self._pixels(i, "out", words)), True, parts)

    @staticmethod
    def _pixels(i: Instruction, prefix: str, words: Index) -> Index:
        row, col = np.arange(i["rows"]) * i[f"{prefix}_oy_step"], np.arange(i["cols"]) * i[f"{prefix}_ox_step"]
        return i[f"{prefix}_addr"] + np.add.outer(np.add.outer(row, col), words)

    def _pool(self, index: int, i: Instruction) -> Iterator[_Touch]:
        words = np.add.outer(np.arange(i["bricks"]) * i["brick_step"], np.arange(1 + i["wide"])).reshape(-1)
        taps = self._taps(i)
        yield _Touch("the activation buffer", self._act(index, i["in_addr"] + np.add.outer(taps, words)), False)
        yield _Touch("the activation buffer", self._act(index, self._pixels(i, "out", words)), True)
