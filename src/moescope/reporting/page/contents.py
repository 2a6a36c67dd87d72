"""What stands where on the page: chapters of sections of blocks, a block a figure or a table.

To add to the page, add a block, a section or a chapter here, name its figures in `captions` and its tables in `writer`.
What the trace cannot tell has no figure and no table; its blocks, and the sections and chapters left empty, go.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Block:
    """A figure, or a table.

    Attributes:
        figure: Name of a figure; empty for a table.
        table: Name of a table.
        folded: The line that unfolds the table; empty if it is open.
        heading: A heading above; may be empty.
    """

    figure: str = ""
    table: str = ""
    folded: str = ""
    heading: str = ""


@dataclass(frozen=True)
class PageSection:
    """One question.

    Attributes:
        name: Its id in the page.
        title: The question.
        short: Its line in the table of contents.
        lead: Why one asks.
        blocks: What answers it.
    """

    name: str
    title: str
    short: str
    lead: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Chapter:
    """Sections that belong together.

    Attributes:
        name: Its id in the page.
        title: Its heading.
        lead: What it is about.
        sections: Its sections.
    """

    name: str
    title: str
    lead: str
    sections: tuple[PageSection, ...]


CHAPTERS = (
    Chapter(
        "published",
        "Section 5, as published",
        "The figures and the table of the paper, made for this model, with the error bars and the nulls that the paper "
        "left out.",
        (
            PageSection(
                "topics",
                "Do experts follow topics?",
                "Topics",
                "If experts divided the world by subject, mathematics would go to some of them and biology to others. "
                "Each figure compares, within a layer, how the domains spread their assignments over the experts.",
                (
                    Block("shares"),
                    Block("divergence"),
                    Block(
                        table="divergence",
                        folded="The same as a table, with intervals and what sampling alone would give",
                    ),
                    Block("choices"),
                ),
            ),
            PageSection(
                "text",
                "Do experts follow words and syntax?",
                "Words and syntax",
                "The paper coloured text by expert and saw syntax rather than subject: words such as “self” in Python "
                "and “Question” in English, and the indentation of code, kept to one expert. Below, the same text in "
                "as many layers as you like.",
                (Block("tokens"), Block(table="words")),
            ),
            PageSection(
                "repeats",
                "Do consecutive tokens stay?",
                "Consecutive tokens",
                "If a token is likely to need the experts of the token before it, a cache of experts pays, and "
                "spreading experts over devices overloads some of them for a while.",
                (Block("repeats"), Block(table="repeats", heading="Table 5. Repeated consecutive assignments")),
            ),
        ),
    ),
    Chapter(
        "explanation",
        "What explains the routing",
        "From shares and repeats to reasons: how much of a choice is known from the word, the neighbours or the "
        "domain, and what is left of the repeats when the words are taken away.",
        (
            PageSection(
                "bits",
                "Where do the bits come from?",
                "Bits of a choice",
                "A choice among experts holds so many bits. A source explains some of them if knowing it shortens the "
                "description of the choice; here, by layer, what each source explains by itself.",
                (
                    Block("explained"),
                    Block("depth"),
                    Block(table="explain", folded="The same as a table, with bounds, permuted routing and p-values"),
                ),
            ),
            PageSection(
                "locality",
                "Are repeats more than words?",
                "Locality",
                "Neighbouring tokens are alike, and like tokens go to like experts. So the repeats are set against "
                "four nulls, the last of which asks what the same words do elsewhere; and followed over longer "
                "distances.",
                (
                    Block("nulls"),
                    Block(table="locality", folded="The same as a table, by domain, and for pairs of equal token ids"),
                    Block("distance"),
                    Block(table="lags", folded="Repeats by distance, as a table"),
                    Block(table="runs", folded="Runs of one first choice, by length"),
                    Block("consistency"),
                    Block(table="consistency", folded="Local routing consistency, as a table"),
                ),
            ),
            PageSection(
                "vocabulary",
                "Which words have an expert?",
                "Vocabulary",
                "The words that the paper names are three. Here are all that occur often enough.",
                (
                    Block("vocabulary"),
                    Block(table="vocabulary", folded="The same as a table"),
                    Block(table="expert_tokens", folded="The tokens of each expert"),
                    Block("classes"),
                    Block(table="word_classes", folded="Classes of words, as a table"),
                    Block(table="word_class_experts", folded="The expert that stands out in each class"),
                ),
            ),
        ),
    ),
    Chapter(
        "structure",
        "Balance and structure",
        "What training made of the experts as a whole: how evenly they work, which of them work together, and the "
        "roads that tokens take through the layers.",
        (
            PageSection(
                "balance",
                "How evenly are the experts loaded?",
                "Load balance",
                "Training balances the load over everything it reads. What a device sees is one batch, and a batch is "
                "of few documents.",
                (
                    Block("balance"),
                    Block(table="balance", folded="Loads of the whole trace and by domain, idle experts"),
                    Block(table="batches", folded="Imbalance within batches"),
                    Block(table="weights", folded="Gate weights"),
                ),
            ),
            PageSection(
                "coactivation",
                "Which experts work together?",
                "Co-activation",
                "A token has several experts. If popularity alone decided, any two would share a token as often as "
                "their loads say.",
                (
                    Block("coactivation"),
                    Block(table="coactivation", folded="The pairs most and least often together"),
                ),
            ),
            PageSection(
                "transitions",
                "Does one layer tell of the next?",
                "Transitions",
                "Numbers of experts mean nothing across layers, but tokens may still travel in company: those of one "
                "expert here may share an expert there.",
                (
                    Block("transitions"),
                    Block(table="information_between_layers", folded="Information from layer to layer"),
                    Block(table="transitions", folded="The transitions most and least frequent"),
                    Block(table="paths", folded="Paths through all layers"),
                ),
            ),
        ),
    ),
    Chapter(
        "domains",
        "Domain by domain",
        "The divergence above sets each domain against all others; this one sets any two side by side.",
        (
            PageSection(
                "pairs",
                "Which domains are alike?",
                "Pairs of domains",
                "Domains that share their experts need no experts of their own, whatever their names.",
                (
                    Block("pairs"),
                    Block(table="domain_pairs", folded="The same as a table, with the domain that stands out"),
                ),
            ),
        ),
    ),
    Chapter(
        "worth",
        "What this routing is worth",
        "Section 5 ends with two consequences: tokens that stay together pay for a cache of experts, and overload "
        "devices that share them. Here both are played through on the trace, beside what it would give without the "
        "locality.",
        (
            PageSection(
                "caches",
                "How large a cache of experts?",
                "Expert caches",
                "Experts that do not fit into fast memory are fetched when a token needs them. A cache keeps some, and "
                "hits more the longer tokens stay.",
                (
                    Block("cache"),
                    Block(table="cache", folded="Hit ratios by policy, and the part of the gap to the optimum closed"),
                    Block(table="cache_layers", folded="By layer"),
                    Block(table="cache_domains", folded="By domain"),
                ),
            ),
            PageSection(
                "prefetch",
                "Prefetch or not?",
                "Prefetching",
                "What is known before a layer is reached can start a load early: the routers of later layers asked "
                "ahead, the layers before, the token before. A list of popular experts needs none of this.",
                (
                    Block("prefetch"),
                    Block(table="prefetch", folded="The same as a table"),
                    Block(table="prefetch_by_layer", folded="By layer, with the gain over popularity"),
                ),
            ),
            PageSection(
                "devices",
                "Which placement on devices?",
                "Expert parallelism",
                "All devices wait for the busiest. Where a batch sends its tokens to few experts, it matters which of "
                "them lie together.",
                (
                    Block("parallel"),
                    Block(table="parallel", folded="Largest load over mean load, by placement"),
                    Block(table="drops", folded="Assignments dropped, by capacity factor"),
                    Block(table="drop_places", folded="Drops by domain and by place in the sequence"),
                    Block(table="reach", folded="Devices that a token reaches, and bytes sent"),
                    Block(table="foreign", folded="Placements fitted on one domain and judged on another"),
                ),
            ),
        ),
    ),
)
"""All that a page can hold, in its order."""


def contents(figures: Container[str], tables: Container[str]) -> tuple[Chapter, ...]:
    """The chapters, without what there is nothing to show for.

    Args:
        figures: Names of the figures there are.
        tables: Names of the tables there are.
    """
    chapters = []
    for chapter in CHAPTERS:
        sections = []
        for section in chapter.sections:
            blocks = tuple(b for b in section.blocks if (b.figure in figures if b.figure else b.table in tables))
            if any(block.figure for block in blocks):
                sections.append(replace(section, blocks=blocks))
        if sections:
            chapters.append(replace(chapter, sections=tuple(sections)))
    return tuple(chapters)
