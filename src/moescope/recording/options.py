"""What a caller may ask of a recording, beside what is the engine's: each choice and each default, once."""

from __future__ import annotations

from dataclasses import dataclass

from moescope.trace.part_file import PART_TOKENS

SAMPLE_SEED = 0


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is read and sampled; `moescope.record` says what each means."""

    max_tokens_per_domain: int | None = None
    max_documents_per_domain: int | None = None
    sample_seed: int = SAMPLE_SEED
    text_field: str | None = None
    domain_field: str | None = None
    strict: bool = False


@dataclass(frozen=True)
class OutputOptions:
    """How a trace is written; `moescope.record` says what each means."""

    part_tokens: int = PART_TOKENS
    force: bool = False

    def __post_init__(self) -> None:
        if self.part_tokens < 1:
            raise ValueError(f"part_tokens {self.part_tokens} is below 1")
