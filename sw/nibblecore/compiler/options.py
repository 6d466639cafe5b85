"""CompileOptions: what the compiler may do. What the core is stands in ArchConfig."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Choices of one compilation; validated on construction.

    Parameters
    ----------
    dump_tensors : bool
        Store the tensor of every layer to DRAM as well, so that any transport can be compared layer by layer.
        Convolutions that are fused with an addition never have a stored tensor of their own.
    keep_on_chip : bool
        Keep tensors in the activation buffer between layers where they fit. Off: every tensor goes through DRAM.
    prefetch : bool
        Load the input of the next output tile while the current one is computed, where two fit.
    tile_pixels : int, optional
        Upper bound of the pixels of an output tile, 1 or more; the accumulator depth bounds them anyway. For tests
        and experiments: the cost model chooses well without it.
    """

    dump_tensors: bool = False
    keep_on_chip: bool = True
    prefetch: bool = True
    tile_pixels: int | None = None

    def __post_init__(self) -> None:
        if self.tile_pixels is not None and self.tile_pixels < 1:
            raise ValueError(f"tile_pixels must be at least 1, not {self.tile_pixels}")
