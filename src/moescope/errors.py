"""Every error that moescope raises about files, models and data: one tree, with one stable code per class.

A wrong argument from Python is a ``ValueError``; ``assert`` is for internal invariants. The code of a class is its name
in lower case (``TraceDamaged``: ``trace-damaged``), its docstring is its entry in `docs/reference/errors.md`.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType


class MoescopeError(Exception):
    """Base of all errors below; catch it to catch them all.

    Args:
        subject: What it concerns: a path, a layer, a document.
        problem: What is wrong with it: what was expected and what was found.
        hint: What to try next.
    """

    code = "error"

    def __init_subclass__(cls) -> None:
        if "code" not in vars(cls):  # the name of the class, unless it says another
            cls.code = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def __init__(self, subject: object, problem: str, hint: str | None = None) -> None:
        self.subject = str(subject)
        self.problem = problem
        self.hint = hint
        super().__init__(f"{self.subject}: {problem}")

    def __reduce__(self) -> tuple[type[MoescopeError], tuple[str, str, str | None]]:
        return type(self), (self.subject, self.problem, self.hint)

    def render(self) -> str:
        """The lines a terminal shows: ``error[code]: subject: problem``, then the hint."""
        line = f"error[{self.code}]: {self.subject}: {self.problem}"
        return f"{line}\nhint: {self.hint}" if self.hint else line


class MissingExtra(MoescopeError, ImportError):
    """A command needs a package that only an extra installs; the hint says how to install it."""


class PluginFailed(MoescopeError):
    """A command that another package adds failed; whom to tell is that package's maker."""


class DiskFull(MoescopeError):
    """The disk is full. Finished parts are kept; the same command resumes once there is free space."""


# ------------------------------------------------------------------------------------------------------- corpus


class CorpusError(MoescopeError):
    """Base of the errors about a corpus."""

    code = "corpus"


class CorpusNotFound(CorpusError):
    """There is nothing at the path, or nothing that a corpus reader recognises."""


class CorpusMalformed(CorpusError):
    """A record of the corpus cannot be read. Raised only with ``--strict``; otherwise counted, with a warning."""


class CorpusField(CorpusError):
    """The field that should hold the text or the domain is not in the corpus."""


class CorpusTooLarge(CorpusError):
    """A record, or a file that must be held whole, is larger than memory is meant to be taken for it."""


class CorpusChanged(CorpusError):
    """The files of the corpus are no longer those whose fingerprint the trace holds."""


class CorpusEmpty(CorpusError):
    """The corpus holds no document with text, or none of its documents yields a token."""


# -------------------------------------------------------------------------------------------------------- model


class ModelError(MoescopeError):
    """Base of the errors about a model."""

    code = "model"


class ModelNotFound(ModelError):
    """There is no model checkpoint at the path."""


class ModelDamaged(ModelError):
    """The checkpoint cannot be read, or lacks some of the model's weights, which would otherwise be random."""


class ModelNotMoE(ModelError):
    """The model has no layer with routed experts."""

    code = "model-not-moe"


class ModelUnsupported(ModelError):
    """The model is a mixture of experts whose routing moescope cannot read exactly, so it is refused."""


class ModelNotStreamable(ModelError):
    """Recorded layer by layer, the model would not make the choices it makes as a whole; ``--no-stream`` loads it."""


class TokenizerMissing(ModelError):
    """The checkpoint has no tokenizer that can be loaded."""


class RouterSilent(ModelError):
    """A layer with routed experts did not report one row per token in a forward pass, so the trace would have gaps."""


class RouterNotFinite(ModelError):
    """A router produced NaN or infinite gate weights, so its choices are meaningless."""


# -------------------------------------------------------------------------------------------------------- trace


class TraceError(MoescopeError):
    """Base of the errors about a trace."""

    code = "trace"


class TraceNotFound(TraceError):
    """There is no trace at the path."""


class TraceExists(TraceError):
    """The output exists and is kept; ``--force`` replaces it."""


class TraceBusy(TraceError):
    """Another process is writing this trace."""


class TraceMismatch(TraceError):
    """An unfinished trace was recorded from another model, corpus or option, so it cannot be resumed with this one."""


class TraceDamaged(TraceError):
    """A file of the trace is missing, fails its checksum or contradicts the header."""


class TraceNewer(TraceError):
    """The trace was written in a later version of the format than this moescope reads."""


class NoSuchLayer(TraceError):
    """The requested layer is not among the layers with routed experts of this model or trace."""


class NoSuchDocument(TraceError):
    """The requested document is not in the trace."""


class NoSuchDomain(TraceError):
    """The requested domain is not in the trace."""


class NotRecorded(TraceError):
    """The trace lacks what the request needs (gate weights, tokens, sequences)."""


class NotExportable(TraceError):
    """The requested format cannot represent what the trace holds."""


# ------------------------------------------------------------------------------------------------------- import


class ForeignTraceError(MoescopeError):
    """Base of the errors about a recording of another program."""

    code = "import"


class ImportNotFound(ForeignTraceError):
    """There is nothing at the path, or nothing that the format's program writes."""


class ImportMalformed(ForeignTraceError):
    """A recording of another program is invalid; the message says where, what was expected and what was found."""


class ImportTooLarge(ForeignTraceError):
    """A piece of a recording that must be held in memory at once (a line, a document, a tensor) exceeds the limit."""


class ImportIncomplete(ForeignTraceError):
    """The file lacks something that the trace needs; the hint names the option that supplies it."""


class TracesUnlike(TraceError):
    """The traces do not hold the same tokens, or not the same layers, so they cannot be compared token by token."""


class OutputExists(MoescopeError):
    """The output of a report or an export exists and is kept; ``--force`` replaces it, if it can be replaced."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Module to import, such as ``torch``.
        extra: The extra of moescope that installs it, such as ``record``.
    Raises:
        MissingExtra: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtra(module, "is not installed", f"pip install 'moescope[{extra}]'") from None
