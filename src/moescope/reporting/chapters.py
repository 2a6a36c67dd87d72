"""The chapters of the page, and the sections that several subjects answer together."""

from __future__ import annotations

from moescope.reporting.subject import Chapter, PageSection

PUBLISHED = Chapter(
    "published",
    "Section 5, as published",
    "The figures and the table of the paper, made for this model, with the error bars and the nulls that the paper "
    "left out.",
)
EXPLANATION = Chapter(
    "explanation",
    "What explains the routing",
    "From shares and repeats to reasons: how much of a choice is known from the word, the neighbours or the "
    "domain, and what is left of the repeats when the words are taken away.",
)
STRUCTURE = Chapter(
    "structure",
    "Balance and structure",
    "What training made of the experts as a whole: how evenly they work, which of them work together, and the "
    "roads that tokens take through the layers.",
)
DOMAINS = Chapter(
    "domains",
    "Domain by domain",
    "The divergence above sets each domain against all others; this one sets any two side by side.",
)
WORTH = Chapter(
    "worth",
    "What this routing is worth",
    "Section 5 ends with two consequences: tokens that stay together pay for a cache of experts, and overload "
    "devices that share them. Here both are played through on the trace, beside what it would give without the "
    "locality.",
)

TOPICS = PageSection(
    PUBLISHED,
    "topics",
    "Do experts follow topics?",
    "Topics",
    "If experts divided the world by subject, mathematics would go to some of them and biology to others. "
    "Each figure compares, within a layer, how the domains spread their assignments over the experts.",
)
TEXT = PageSection(
    PUBLISHED,
    "text",
    "Do experts follow words and syntax?",
    "Words and syntax",
    "The paper coloured text by expert and saw syntax rather than subject: words such as “self” in Python "
    "and “Question” in English, and the indentation of code, kept to one expert. Below, the same text in "
    "as many layers as you like.",
)
LOCALITY = PageSection(
    EXPLANATION,
    "locality",
    "Are repeats more than words?",
    "Locality",
    "Neighbouring tokens are alike, and like tokens go to like experts. So the repeats are set against "
    "four nulls, the last of which asks what the same words do elsewhere; and followed over longer "
    "distances.",
)
VOCABULARY = PageSection(
    EXPLANATION,
    "vocabulary",
    "Which words have an expert?",
    "Vocabulary",
    "The words that the paper names are three. Here are all that occur often enough.",
)
