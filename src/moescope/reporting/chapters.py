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
    "How much of a choice can be predicted from the token, its neighbours or the domain, and how much of the repeats "
    "remains once the tokens are accounted for.",
)
STRUCTURE = Chapter(
    "structure",
    "Balance and structure",
    "The experts as a whole: how evenly they are loaded, which of them are chosen together, and the paths that tokens "
    "take through the layers.",
)
DOMAINS = Chapter(
    "domains",
    "Domain by domain",
    "The divergence above compares each domain with all others; this one compares any two.",
)
WORTH = Chapter(
    "worth",
    "What this routing means for serving",
    "Section 5 ends with two consequences: consecutive tokens with the same experts make a cache of experts "
    "worthwhile, and overload the devices that share the experts. Both are simulated on this trace, beside the same "
    "trace without its locality.",
)

TOPICS = PageSection(
    PUBLISHED,
    "topics",
    "Do experts follow topics?",
    "Topics",
    "If experts specialized by subject, mathematics would go to some of them and biology to others. Each figure "
    "compares, within a layer, how the domains distribute their assignments over the experts.",
)
TEXT = PageSection(
    PUBLISHED,
    "text",
    "Do experts follow words and syntax?",
    "Words and syntax",
    "The paper coloured text by expert and saw syntax rather than subject: words such as “self” in Python and "
    "“Question” in English, and the indentation of code, kept to one expert. Below, the same text in as many layers "
    "as you like.",
)
LOCALITY = PageSection(
    EXPLANATION,
    "locality",
    "Are repeats more than words?",
    "Locality",
    "Neighbouring tokens are similar, and similar tokens go to similar experts. The repeats are therefore compared "
    "with four nulls, the last of which is the same words in other documents, and measured over longer distances.",
)
VOCABULARY = PageSection(
    EXPLANATION,
    "vocabulary",
    "Which words have an expert?",
    "Vocabulary",
    "The paper names three words. Here are all token ids that occur often enough.",
)
