"""Errors that a user can cause and can mend; one subclass per cause.

Wrong arguments of a function are :class:`TypeError` or :class:`ValueError` as everywhere in Python.
"""


class NibbleError(Exception):
    """Base of every error whose cause is the user's model, file, board or installation.

    Parameters
    ----------
    message : str
        One or more sentences: what, where, which value, what is allowed.
    hint : str, optional
        What to do about it, as a sentence. ``str(error)`` is the message, a line break and the hint.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"


class ToolchainError(NibbleError):
    """A program that simulation, proof or synthesis needs is missing, too old, or has failed."""


class ConfigError(NibbleError, ValueError):
    """An ArchConfig that describes no core."""


class EncodingError(NibbleError, ValueError):
    """An instruction field that does not fit, or a word that encodes no instruction."""


class ProgramError(NibbleError):
    """A program file that is truncated, altered, foreign, or of another version or core."""


class LintError(NibbleError):
    """A program that could race, deadlock, leave a buffer or read what nobody wrote."""


class CompileError(NibbleError):
    """A network that the core cannot run as it is.

    Parameters
    ----------
    violations : list[str]
        Every reason at once, one sentence each.
    """

    def __init__(self, violations: list[str], *, hint: str | None = None) -> None:
        super().__init__("\n".join(violations), hint=hint)
        self.violations = violations


class GraphError(NibbleError):
    """An integer graph that breaks the rules of :mod:`nibblecore.ir.graph`.

    Parameters
    ----------
    violations : list[str]
        Every broken rule at once, one sentence each.
    """

    def __init__(self, violations: list[str], *, hint: str | None = None) -> None:
        super().__init__("\n".join(violations), hint=hint)
        self.violations = violations


class TrainingError(NibbleError):
    """Training that cannot go on: steps without calibration, a loss that is no number."""


class RecipeError(NibbleError):
    """A recipe that is missing, cannot be read, or asks for what there is not."""


class DataError(NibbleError):
    """Images or labels that cannot be trained on: none at all, broken, empty, or of the wrong shape."""


class CheckpointError(NibbleError):
    """A checkpoint that is truncated, altered, foreign, or of another model."""


class ExecutionError(NibbleError):
    """A core, simulated or real, that stopped with an error cause or did not finish."""


class SimulationError(NibbleError):
    """A bench on the hardware failed, or did not come to an end."""


class ProofError(NibbleError):
    """A property of the hardware does not hold, cannot be reached, or could not be decided."""
