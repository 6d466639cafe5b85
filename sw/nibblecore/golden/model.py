"""Instruction-level functional model of a core.

Bit-exact, not cycle-exact: each instruction acts at once, in any order that queues and semaphores allow. Memory that
nobody has written is poisoned: reading it is an error that names the instruction, the buffer and the word.
"""

import random
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from ..arch import numerics
from ..arch.config import PARAM_BITS, ArchConfig
from ..arch.isa import (
    INSTRUCTION_BYTES,
    REGIONS,
    Engine,
    Instruction,
    LoadTarget,
    Opcode,
    OutputMode,
    decode,
    disassemble,
    engines_in,
)
from ..arch.regs import ErrorCause, ErrorUnit
from ..errors import EncodingError, ExecutionError
from ..runtime.layout import bytes_to_nibbles, nibbles_to_bytes

ADDRESS_MASK: Final = 0xFFFF
Index = npt.NDArray[np.int64]
Observer = Callable[[int, Instruction, "GoldenCore"], None]


class CoreStopped(Exception):
    """The core stops with an error cause, as hardware does: unit, cause and index of the instruction."""

    def __init__(self, cause: ErrorCause, unit: ErrorUnit, index: int, detail: str) -> None:
        super().__init__(detail)
        self.cause, self.unit, self.index = cause, unit, index


class GoldenMemory:
    """DRAM behind the core: ``size`` bytes from address 0, and which of its words somebody has written.

    Parameters
    ----------
    size : int
        Bytes.
    word_bytes : int
        Granularity of the poison.
    """

    def __init__(self, size: int, word_bytes: int) -> None:
        self.data = np.zeros(size, np.uint8)
        self.written = np.zeros(-(-size // word_bytes), bool)
        self.word_bytes = word_bytes
        self._by_host = self.written.copy()

    def write(self, address: int, data: bytes) -> None:
        """The host writes; what it wrote stays written in every run."""
        self._check(address, len(data))
        self.data[address : address + len(data)] = np.frombuffer(data, np.uint8)
        words = slice(address // self.word_bytes, -(-(address + len(data)) // self.word_bytes))
        self.written[words] = self._by_host[words] = True

    def begin_run(self) -> None:
        """Forget what the core itself has written: a run must not read what an earlier one left."""
        self.written[:] = self._by_host

    def read(self, address: int, count: int) -> bytes:
        self._check(address, count)
        return self.data[address : address + count].tobytes()

    def _check(self, address: int, count: int) -> None:
        if address < 0 or count < 0 or address + count > self.data.size:
            raise ExecutionError(
                f"bytes {address:#x}..{address + count:#x} lie outside the memory of {self.data.size:#x}"
            )


class GoldenCore:
    """Executes one program after another on a memory.

    Parameters
    ----------
    arch : ArchConfig
        The core.
    memory : GoldenMemory
        DRAM.
    regions : list of (base, size)
        Bytes, one pair per region, as the host writes them into the CSRs.
    """

    def __init__(self, arch: ArchConfig, memory: GoldenMemory, regions: list[tuple[int, int]]) -> None:
        if len(regions) != REGIONS:
            raise ValueError(f"regions must have {REGIONS} entries, not {len(regions)}")
        self.arch, self.memory, self.regions = arch, memory, regions
        lanes = arch.lanes
        self.act = np.zeros((arch.act_depth, lanes), np.int8)
        self.act_written = np.zeros((arch.act_depth, lanes), bool)
        self.weights = np.zeros((arch.weight_depth, lanes), np.int8)
        self.weights_written = np.zeros(arch.weight_depth, bool)
        self.acc = np.zeros((2, arch.acc_depth, arch.columns), np.int64)
        self.acc_written = np.zeros((2, arch.acc_depth), bool)
        self._decoded: dict[bytes, Instruction] = {}

    # Execution -------------------------------------------------------------------------------------------------

    def run(self, *, seed: int | None = None, observer: Observer | None = None) -> int:
        """Fetch from region 0 and execute until END; returns the number of instructions executed.

        Parameters
        ----------
        seed : int, optional
            Draw the order of the engines at random from those that queues and semaphores allow; without it, the
            order of the stream wherever possible.
        observer : callable, optional
            Called with index, instruction and this core after every instruction.

        Raises
        ------
        CoreStopped
            Where hardware stops with an error cause: illegal encoding, access outside a region.
        ExecutionError
            On a deadlock, a read of something nobody has written, or a tile larger than the accumulators: what
            hardware cannot see.
        """
        chooser = random.Random(seed) if seed is not None else None
        queues: dict[Engine, deque[tuple[int, Instruction]]] = {e: deque() for e in Engine}
        tokens = {(a, b): 0 for a in Engine for b in Engine}
        limit = (1 << self.arch.semaphore_bits) - 1
        signals: dict[Engine, deque[int]] = {e: deque() for e in Engine}
        fetched, ended, executed = 0, False, 0
        pending: Instruction | None = None
        while True:
            moves: list[Engine | None] = []
            if not ended and pending is None:
                pending = self._fetch(fetched)
                ended = pending.opcode is Opcode.END
                fetched += 1
            if pending is not None and not ended:
                is_free = len(queues[self._engine(pending)]) < self.arch.queue_depth
                if self.arch.sequential:
                    is_free = not any(queues.values()) and not any(signals.values())
                if is_free:
                    moves.append(None)
            for engine in Engine:
                if signals[engine]:
                    if all(tokens[engine, to] < limit for to in engines_in(signals[engine][0])):
                        moves.append(engine)
                elif queues[engine] and all(tokens[frm, engine] for frm in engines_in(queues[engine][0][1]["wait"])):
                    moves.append(engine)
            if not moves:
                if ended and not any(queues.values()) and not any(signals.values()):
                    return executed
                raise ExecutionError(self._deadlock(queues, tokens))
            move = chooser.choice(moves) if chooser else self._oldest(moves, queues, signals)
            if move is None:
                assert pending is not None
                queues[self._engine(pending)].append((fetched - 1, pending))
                pending = None
            elif signals[move]:
                for to in engines_in(signals[move].popleft()):
                    tokens[move, to] += 1
            else:
                index, instruction = queues[move].popleft()
                for frm in engines_in(instruction["wait"]):
                    tokens[frm, move] -= 1
                self._execute(index, instruction)
                executed += 1
                if observer is not None:
                    observer(index, instruction, self)
                if instruction["signal"]:
                    signals[move].append(instruction["signal"])

    @staticmethod
    def _engine(instruction: Instruction) -> Engine:
        assert instruction.engine is not None
        return instruction.engine

    @staticmethod
    def _oldest(
        moves: list[Engine | None],
        queues: dict[Engine, deque[tuple[int, Instruction]]],
        signals: dict[Engine, deque[int]],
    ) -> Engine | None:
        """Signals first, then the earliest instruction of the stream, then fetch."""
        for move in moves:
            if move is not None and signals[move]:
                return move
        ready = [m for m in moves if m is not None]
        return min(ready, key=lambda e: queues[e][0][0]) if ready else None

    @staticmethod
    def _deadlock(
        queues: dict[Engine, deque[tuple[int, Instruction]]], tokens: dict[tuple[Engine, Engine], int]
    ) -> str:
        waits = []
        for engine, queue in queues.items():
            if queue:
                index, instruction = queue[0]
                missing = [f.name for f in engines_in(instruction["wait"]) if not tokens[f, engine]]
                waits.append(
                    f"{engine.name} at instruction {index} waits for {', '.join(missing) or 'a full semaphore'}"
                )
        return "the program deadlocks: " + ("; ".join(waits) or "fetch waits for a queue that nothing empties")

    def _fetch(self, index: int) -> Instruction:
        base, size = self.regions[0]
        offset = index * INSTRUCTION_BYTES
        if offset + INSTRUCTION_BYTES > size:
            raise CoreStopped(
                ErrorCause.REGION, ErrorUnit.FETCH, index, f"instruction {index} lies outside the program region"
            )
        raw = self.memory.read(base + offset, INSTRUCTION_BYTES)
        if raw not in self._decoded:
            try:
                self._decoded[raw] = decode(int.from_bytes(raw, "little"))
            except EncodingError as error:
                raise CoreStopped(
                    ErrorCause.ILLEGAL_INSTRUCTION, ErrorUnit.FETCH, index, f"instruction {index}: {error}"
                ) from None
        return self._decoded[raw]

    def _execute(self, index: int, i: Instruction) -> None:
        try:
            {
                Opcode.LOAD: self._load,
                Opcode.STORE: self._store,
                Opcode.MAC: self._mac,
                Opcode.POST: self._post,
                Opcode.POOL: self._pool,
            }[i.opcode](i)
        except ExecutionError as error:
            raise ExecutionError(f"instruction {index} ({disassemble(i)}): {error}") from None
        except CoreStopped as stop:
            raise CoreStopped(stop.cause, stop.unit, index, f"instruction {index}: {stop}") from None

    # Address generation ----------------------------------------------------------------------------------------

    def _dma_addresses(self, i: Instruction, depth: int, unit: ErrorUnit) -> tuple[Index, Index]:
        """DRAM word numbers (absolute) and buffer words, in order of transfer."""
        n0, n1, n2 = (np.arange(i[f"count{k}"], dtype=np.int64) for k in range(3))
        n0, n1, n2 = n0[None, None, :], n1[None, :, None], n2[:, None, None]
        offset = (i["dram_addr"] + n2 * i["dram_step2"] + n1 * i["dram_step1"] + n0).reshape(-1)
        local = i["local_addr"] + n2 * i["local_step2"] + n1 * i["local_step1"] + n0
        base, size = self.regions[i["region"]]
        if (int(offset.max()) + 1) * self.arch.word_bytes > size:
            raise CoreStopped(
                ErrorCause.REGION,
                unit,
                -1,
                f"word {int(offset.max())} lies outside region {i['region']} of {size} bytes",
            )
        return base // self.arch.word_bytes + offset, local.reshape(-1) % (ADDRESS_MASK + 1) % depth

    @staticmethod
    def _grid(i: Instruction, kernel: tuple[Index, Index]) -> tuple[npt.NDArray[np.bool_], Index, Index]:
        """Whether each (pixel, tap) is inside the map; pixel and tap address offsets, shapes (pixels, 1), (1, taps)."""
        ky, kx = kernel
        oy, ox = (a.reshape(-1, 1) for a in np.divmod(np.arange(i["rows"] * i["cols"], dtype=np.int64), i["cols"]))
        y = i["y0"] + oy * i["stride_y"] + ky * i["dilation_y"]
        x = i["x0"] + ox * i["stride_x"] + kx * i["dilation_x"]
        inside = (y >= 0) & (y < i["height"]) & (x >= 0) & (x < i["width"])
        return inside, oy * i["oy_step"] + ox * i["ox_step"], ky * i["ky_step"] + kx * i["kx_step"]

    def _act_words(self, addresses: Index, needed: npt.NDArray[np.bool_] | None = None) -> Index:
        """Words of the activation buffer as int64, shape ``(*addresses.shape, lanes)``; poison where needed raises."""
        addresses = addresses % (ADDRESS_MASK + 1) % self.arch.act_depth
        good = self.act_written[addresses].all(-1)
        if needed is not None:
            good |= ~needed
        if not good.all():
            raise ExecutionError(
                f"reads word {int(addresses[~good].flat[0])} of the activation buffer, which nobody has written"
            )
        return self.act[addresses].astype(np.int64)

    def _weight_words(self, addresses: Index) -> npt.NDArray[np.int8]:
        addresses = addresses % (ADDRESS_MASK + 1) % self.arch.weight_depth
        good = self.weights_written[addresses]
        if not good.all():
            raise ExecutionError(
                f"reads word {int(addresses[~good].flat[0])} of the weight buffer, which nobody has written"
            )
        return self.weights[addresses]

    # Engines ---------------------------------------------------------------------------------------------------

    def _dram_words(self) -> npt.NDArray[np.uint8]:
        usable = self.memory.data.size // self.arch.word_bytes * self.arch.word_bytes
        return self.memory.data[:usable].reshape(-1, self.arch.word_bytes)

    def _load(self, i: Instruction) -> None:
        to_weights = i["target"] == LoadTarget.WEIGHTS
        dram, local = self._dma_addresses(
            i, self.arch.weight_depth if to_weights else self.arch.act_depth, ErrorUnit.LOAD
        )
        good = self.memory.written[dram]
        if not good.all():
            raise ExecutionError(f"reads DRAM word {int(dram[~good][0])}, which nobody has written")
        nibbles = bytes_to_nibbles(self._dram_words()[dram])
        if to_weights:
            self.weights[local], self.weights_written[local] = nibbles, True
        else:
            self.act[local], self.act_written[local] = nibbles, True

    def _store(self, i: Instruction) -> None:
        dram, local = self._dma_addresses(i, self.arch.act_depth, ErrorUnit.STORE)
        self._dram_words()[dram] = nibbles_to_bytes(self._act_words(local))
        self.memory.written[dram] = True

    def _mac(self, i: Instruction) -> None:
        arch, pixels = self.arch, i["rows"] * i["cols"]
        self._check_tile(pixels)
        ky, kx, brick = (
            a.reshape(1, -1)
            for a in np.unravel_index(
                np.arange(i["kernel_y"] * i["kernel_x"] * i["bricks"]), (i["kernel_y"], i["kernel_x"], i["bricks"])
            )
        )
        inside, pixel_offset, tap_offset = self._grid(i, (ky, kx))
        addresses = i["x_addr"] + pixel_offset + tap_offset + brick * i["brick_step"]
        x = np.where(inside[..., None], self._act_words(addresses, inside), i["pad"])
        passes = brick.size
        tiles = i["w_addr"] + np.arange(passes)[:, None] * i["w_step"] + np.arange(arch.columns)
        weights = self._weight_words(tiles)  # (passes, columns, lanes)
        low, high = arch.weight_range
        if weights.min() < low or weights.max() > high:
            raise ExecutionError(f"multiplies by a weight outside {low}..{high}, which this core's elements take")
        # float64 is exact here: |sum| <= 64 * lanes * passes, far below 2**53.
        sums = np.einsum("npl,pcl->nc", x.astype(np.float64), weights.astype(np.float64), optimize=True)
        total = sums.astype(np.int64) << 4 * i["shift"]
        bank = i["acc_bank"]
        if i["accumulate"]:
            if not self.acc_written[bank, :pixels].all():
                raise ExecutionError(f"adds to accumulators of bank {bank} that nobody has written")
            total += self.acc[bank, :pixels]
        self.acc[bank, :pixels] = numerics.wrap(total, arch.acc_bits)
        self.acc_written[bank, :pixels] = True

    def _check_tile(self, pixels: int) -> None:
        if pixels > self.arch.acc_depth:
            raise ExecutionError(f"the tile has {pixels} pixels, the accumulators hold {self.arch.acc_depth}")

    def _records(self, address: int) -> tuple[Index, Index, Index]:
        """Bias, multiplier and shift of a column tile, each of shape (columns,)."""
        arch = self.arch
        raw = nibbles_to_bytes(self._weight_words(address + np.arange(arch.param_words))).reshape(-1)
        words = [
            int.from_bytes(raw[k : k + PARAM_BITS // 8].tobytes(), "little")
            for k in range(0, arch.columns * PARAM_BITS // 8, PARAM_BITS // 8)
        ]
        bias = np.array([numerics.wrap(w, numerics.BIAS_BITS) for w in words], np.int64)
        mult = np.array([numerics.wrap(w >> numerics.BIAS_BITS, numerics.MULT_BITS) for w in words], np.int64)
        shift = np.array([w >> numerics.BIAS_BITS + numerics.MULT_BITS & 63 for w in words], np.int64)
        return bias, mult, shift

    def _post(self, i: Instruction) -> None:
        arch, pixels, bank = self.arch, i["rows"] * i["cols"], i["acc_bank"]
        self._check_tile(pixels)
        if i["bricks"] > arch.bricks_per_tile or i["part"] >= arch.parts_per_brick:
            raise ExecutionError(
                f"a column tile has {arch.bricks_per_tile} bricks and a brick {arch.parts_per_brick} parts"
            )
        if not self.acc_written[bank, :pixels].all():
            raise ExecutionError(f"drains accumulators of bank {bank} that nobody has written")
        bias, mult, shift = self._records(i["p_addr"])
        acc = self.acc[bank, :pixels]
        oy, ox = np.divmod(np.arange(pixels, dtype=np.int64), i["cols"])
        out = i["out_addr"] + oy * i["out_oy_step"] + ox * i["out_ox_step"]
        if i["mode"] == OutputMode.RAW32:
            self._write_raw(i, out, numerics.wrap(acc + bias, 32))
            return
        if shift.min() < numerics.SHIFT_MIN or shift.max() > numerics.SHIFT_MAX:
            raise ExecutionError(f"a requantization record has shift {int(shift.min())}..{int(shift.max())}, not 1..47")
        if not numerics.signed_fits(int((acc + bias).max()), 32) or not numerics.signed_fits(
            int((acc + bias).min()), 32
        ):
            raise ExecutionError("acc + bias does not fit 32 bits")
        q = numerics.clamp(numerics.requantize(acc, bias, mult, shift) + i["zero"], i["low"], i["high"])
        if i["add"]:
            q = numerics.residual_add(
                q,
                self._stored_operand(i, oy, ox),
                zero_a=i["zero"],
                zero_b=i["zero_b"],
                k_a=i["k_a"],
                k_b=i["k_b"],
                n=i["add_shift"],
                zero=i["add_zero"],
                low=i["add_low"],
                high=i["add_high"],
            )
        self._write_codes(i, out, q)

    def _lanes(self, i: Instruction) -> slice:
        """Nibbles of a word that this column tile fills."""
        start = i["part"] * self.arch.columns if self.arch.parts_per_brick > 1 else 0
        return slice(start, start + min(self.arch.columns, self.arch.lanes))

    def _stored_operand(self, i: Instruction, oy: Index, ox: Index) -> Index:
        """Codes of the stored tensor, shape (pixels, columns); lanes of bricks that are not written read as 0."""
        arch, wide, bricks = self.arch, i["add_wide"], i["bricks"]
        base = i["add_addr"] + oy * i["add_oy_step"] + ox * i["add_ox_step"]
        words = self._act_words(base[:, None] + np.arange(bricks * (1 + wide)))[..., self._lanes(i)]
        if wide:
            words = numerics.join_code8(words[:, 0::2], words[:, 1::2])
        result = np.zeros((base.size, arch.columns), np.int64)
        result[:, : words.shape[1] * words.shape[2]] = words.reshape(base.size, -1)
        return result

    def _write_codes(self, i: Instruction, out: Index, q: Index) -> None:
        arch, lanes = self.arch, self._lanes(i)
        per_brick = q.reshape(q.shape[0], arch.bricks_per_tile, -1)[:, : i["bricks"]]
        if i["mode"] == OutputMode.INT8:
            words = np.stack(numerics.split_code8(per_brick), axis=2).reshape(q.shape[0], -1, per_brick.shape[2])
        else:
            words = numerics.wrap(per_brick, 4)
        address = (out[:, None] + np.arange(words.shape[1])) % (ADDRESS_MASK + 1) % arch.act_depth
        self.act[address, lanes] = words
        self.act_written[address, lanes] = True

    def _write_raw(self, i: Instruction, out: Index, sums: Index) -> None:
        arch = self.arch
        used = sums if arch.parts_per_brick > 1 else sums[:, : i["bricks"] * arch.lanes]
        nibbles = bytes_to_nibbles(np.ascontiguousarray(used.astype("<i4")).view(np.uint8).reshape(used.shape[0], -1))
        words = nibbles.reshape(used.shape[0], -1, arch.lanes)
        first = i["part"] * words.shape[1] if arch.parts_per_brick > 1 else 0
        address = (out[:, None] + first + np.arange(words.shape[1])) % (ADDRESS_MASK + 1) % arch.act_depth
        self.act[address] = words
        self.act_written[address] = True

    def _pool(self, i: Instruction) -> None:
        wide = i["wide"]
        ky, kx = (a.reshape(1, -1) for a in np.divmod(np.arange(i["kernel_y"] * i["kernel_x"]), i["kernel_x"]))
        inside, pixel_offset, tap_offset = self._grid(i, (ky, kx))
        brick = np.arange(i["bricks"]).reshape(-1, 1, 1) * i["brick_step"]
        addresses = i["in_addr"] + brick + pixel_offset + tap_offset  # (bricks, pixels, taps)
        needed = np.broadcast_to(inside, addresses.shape)
        codes = self._act_words(addresses, needed)
        if wide:
            codes = numerics.join_code8(codes, self._act_words(addresses + 1, needed))
        lowest = numerics.code_range(8 if wide else 4)[0]
        best = np.where(needed[..., None], codes, lowest).max(axis=2)  # (bricks, pixels, lanes)
        oy, ox = np.divmod(np.arange(i["rows"] * i["cols"], dtype=np.int64), i["cols"])
        out = i["out_addr"] + brick[:, :, 0] + oy * i["out_oy_step"] + ox * i["out_ox_step"]
        for plane, words in enumerate(numerics.split_code8(best) if wide else (best,)):
            address = (out + plane) % (ADDRESS_MASK + 1) % self.arch.act_depth
            self.act[address], self.act_written[address] = words, True
