"""The words around each figure: what is drawn, how to read it, what it cannot tell; and the values behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import xarray as xr

from moescope.reporting import frames
from moescope.reporting.cache_tables import cache_frame
from moescope.reporting.comparison_tables import consistency_table
from moescope.reporting.documents import RoutedDocument
from moescope.reporting.explain_tables import explain_frame
from moescope.reporting.figures import as_bars
from moescope.reporting.figures.joint import MOST_WITH_NUMBERS
from moescope.reporting.locality_tables import lags_frame, locality_frame
from moescope.reporting.page import PageFigure
from moescope.reporting.parallel_tables import parallel_frame
from moescope.reporting.prefetch_tables import prefetch_frame
from moescope.reporting.results import Results
from moescope.reporting.tables import describe_any
from moescope.reporting.vocabulary_tables import syntax_frame, vocabulary_frame

FEWEST_DOMAINS_IN_PAIRS = 3
"""With two domains, each is "the others" to the other, and the pair says nothing new."""


def page_figures(results: Results, examples: Sequence[RoutedDocument]) -> Iterator[PageFigure]:
    """The figures of the page, not drawn yet, in its order: those that the trace can tell.

    Args:
        results: What the report is of.
        examples: The documents of Figure 8.
    """
    yield from _of_section_5(results, examples)
    if results.explained is not None:
        yield from _of_bits(results, results.explained)
    if results.locality is not None:
        yield from _of_locality(results, results.locality)
    if results.consistency is not None:
        yield _of_consistency(results.consistency)
    if results.vocabulary is not None:
        yield _of_vocabulary(results, results.vocabulary)
    if results.syntax is not None:
        yield _of_word_classes(results.syntax)
    yield _of_balance(results.balance)
    if results.coactivation is not None:
        yield _of_coactivation(results, results.coactivation)
    if results.transitions is not None:
        yield _of_transitions(results, results.transitions)
    if results.shares.sizes["domain"] >= FEWEST_DOMAINS_IN_PAIRS:
        yield _of_domain_pairs(results)
    if results.cache is not None:
        yield _of_cache(results.cache)
    if results.prefetch is not None:
        yield _of_prefetch(results.prefetch)
    if results.parallel is not None:
        yield _of_parallel(results.parallel)


def _of_section_5(results: Results, examples: Sequence[RoutedDocument]) -> Iterator[PageFigure]:
    """The paper's figures, and the divergence that it judged by eye."""
    top_k = max(layer.top_k for layer in results.trace.layers)
    either = describe_any(top_k)
    bars = as_bars(results.shares)
    uniform = (
        "Dashed: uniform, 1 over the number of experts."
        if bars
        else "White: uniform, 1 over the number of experts; black: exactly none. Experts in the order of their mean "
        "share."
    )
    layers = list(results.layers)
    shown = results.shares.sel(layer=layers)
    known = shown["choice"].values.tolist()
    yield PageFigure(
        name="shares",
        file="figure7-shares",
        label="Figure 7",
        title="Share of a domain's assignments that each expert receives",
        caption=(
            f"{_capital(either)}; the shares of a domain and layer sum to 1. {uniform} "
            + ("Thin lines: 95 % intervals, clustered by document." if bars else "Intervals are in the CSV.")
        ),
        how=(
            "Compare the domains above one expert. Where experts follow topics, one domain towers over the others, "
            "and where they do not, a group of bars has one height. How far a group is from the uniform line is a "
            "matter of load balance, not of topic."
            if bars
            else "Compare the rows of one panel. Where experts follow topics, a row has dark places of its own; "
            "where they do not, all rows fade alike from left to right. That common slope is a matter of load "
            "balance, not of topic."
        ),
        cannot=(
            "Equal shares do not mean equal tokens: an expert may get the verbs of one domain and the numbers of "
            "another. Experts of different layers have nothing in common but their number."
        ),
        frame=frames.shares_frame(shown.sel(choice=["either"])),
    )
    if results.shares.sizes["domain"] > 1:
        yield PageFigure(
            name="divergence",
            file="divergence",
            label="Divergence",
            title="How far each domain is from the others, layer by layer",
            caption=(
                "Jensen-Shannon divergence, bits, between a domain's shares and the mean of the other domains'. Not in "
                "the paper, which judged by eye."
            ),
            how=(
                "A dark row is a domain with experts of its own; dark columns at both ends are what the paper says of "
                "the first and the last layer. A dot marks what sampling documents alone does not explain (false "
                "discovery rate 5 %)."
            ),
            cannot=(
                "With many documents even a trifle gets its dot: read the dot for whether, the bits for how much. Nor "
                "does it say which experts make the difference, or whether topic, style or script is behind it."
            ),
            frame=frames.divergence_frame(results.divergence),
        )
    if len(known) > 1:
        choices = list(dict.fromkeys(["either", "first", known[top_k]]))
        yield PageFigure(
            name="choices",
            file="figure9-choices",
            label="Figure 9",
            title="The same by choice",
            caption=(
                f"{_capital(either)}, and the choices with the largest and the smallest gate weight apart. {uniform}"
            ),
            how=(
                "If the first choice carries the topic and the last fills up, the first row differs by domain and the "
                "last does not. If all rows look alike, the choices are exchangeable in this respect."
            ),
            cannot="It does not show which choices go together, nor how much weight each has in the output.",
            frame=frames.shares_frame(shown.sel(choice=choices)),
        )
    if results.words is not None:
        yield PageFigure(
            name="tokens",
            file="figure8-tokens",
            label="Figure 8",
            title="Text on the colours of its experts",
            caption="First choice, a column a layer.",
            how="",
            cannot="",
            frame=frames.tokens_frame(examples, layers[:3]),
        )
    if results.repeats is not None:
        yield PageFigure(
            name="repeats",
            file="figure10-repeats",
            label="Figure 10",
            title="Repeated consecutive assignments by layer",
            caption=(
                f"Per cent of consecutive tokens {_repeated(results.repeats, either)}. Dashed: uniform routing. Grey: "
                "what the popularity of the experts alone predicts, from the lowest to the highest domain. Intervals "
                "95 %, clustered by document."
            ),
            how=(
                "A line above the grey band is order: a token is likelier to go where the token before it went. Within "
                "the band, compare a domain with its own null, in Table 5 and the CSV. What lies between the dashed "
                "line and the band is only unequal load, which the paper's baseline leaves out."
            ),
            cannot=(
                "It does not tell why: neighbouring tokens are alike, and like tokens go to like experts. Nor what a "
                "cache gains, for that depends on longer memory than one token."
            ),
            frame=frames.repeats_frame(results.repeats),
        )


def _of_bits(results: Results, explained: xr.Dataset) -> Iterator[PageFigure]:
    first = explained.attrs["choice"] == "first"
    what = "first choice" if first else "choice"
    shown = explained.sel(layer=list(results.layers))
    yield PageFigure(
        name="explained",
        file="explained",
        label="Bits",
        title=f"Where the bits of the {what} come from",
        caption=(
            f"Bits of the {what} that each source alone explains; line: 95 % interval, by document. Dashed: all bits "
            "of the choice. Grey: between what is saved on documents left out and the plain count, which bound the "
            "truth but for sampling. Tick: the same of permuted routing."
        ),
        how=(
            "Compare a bar with the dashed line: that is how much of the choice one knows from the source. What goes "
            "beyond the tick is more than the document's own mix of experts. A router that looks words up has a long "
            "bar at the token and little beyond it elsewhere."
        ),
        cannot=(
            "Sources overlap, and their bits do not add up: a domain has its words, and the layer before has seen the "
            "same token. No bar says what causes the choice. A wide grey band says that the trace is too short for "
            "that source."
        ),
        frame=explain_frame(shown),
    )
    if explained.sizes["layer"] > len(results.layers):
        yield PageFigure(
            name="depth",
            file="explained-by-layer",
            label="Bits by layer",
            title=f"Share of the {what} that each source explains, by layer",
            caption=f"Per cent of the bits of the {what}, H(E); bands: 95 % intervals, by document.",
            how=(
                "Lines that fall with depth are sources near the input, such as the token; lines that rise are what "
                "the layers before have made of the context."
            ),
            cannot=(
                "The lines overlap and do not add up to 100. What no line explains may be context, or chance of the "
                "training."
            ),
            frame=explain_frame(explained),
        )


def _of_locality(results: Results, locality: xr.Dataset) -> Iterator[PageFigure]:
    words = bool(locality["excess"].sel(null="words").notnull().any())
    yield PageFigure(
        name="nulls",
        file="repeats-above-nulls",
        label="Nulls",
        title=f"Repeats above what loads{', document and words' if words else ' and document'} predict",
        caption=(
            "Points by which neighbours repeat an expert more often than each null predicts, by layer, all domains "
            f"together: {'four' if words else 'three'} nulls, from uniform routing to "
            f"{'the same words in other documents' if words else 'the document in any order'}. Bands: 95 % intervals "
            "of the difference, by document."
        ),
        how=(
            "Each null takes away what it explains: unequal loads; the document's own mix; the words, with no regard "
            "to the document. Near 0 above the same words, the router looks words up; what stays above 0 is context."
            if words
            else "From line to line a null takes away what it explains: unequal loads, then the document's own mix. "
            "What stays above 0 is order."
        ),
        cannot=(
            "What is left over the words need not be syntax: the topic of a document is part of it, because a word has "
            "other senses in other documents."
            if words
            else "The trace has no token ids, so it cannot be told whether the words explain what is left."
        ),
        frame=locality_frame(locality),
    )
    yield PageFigure(
        name="distance",
        file="repeats-by-distance",
        label="Distance",
        title="Repeats by distance",
        caption=(
            "Per cent of the pairs of tokens so far apart, in one sequence, that repeat an expert, a line a layer. "
            "Bands: 95 % intervals, by document. Dotted: the document in any order, which knows no distance."
        ),
        how=(
            "How far a line stays above its dotted one is how far the memory of the routing reaches: a few tokens for "
            "phrases, a hundred for passages. A cache gains from the whole area between them."
        ),
        cannot=(
            "Long distances exist only in long sequences, so the points of one line are not of the same documents. Nor "
            "does a line say whether words or context return."
        ),
        frame=lags_frame(locality.sel(layer=list(results.layers))),
    )


def _of_consistency(consistency: xr.Dataset) -> PageFigure:
    lengths = consistency["length"].values[consistency["srp"].notnull().any(["domain", "layer"]).values].tolist()
    return PageFigure(
        name="consistency",
        file="consistency",
        label="Consistency",
        title=f"How well one fixed set of experts would serve {' or '.join(map(str, lengths))} consecutive tokens",
        caption=(
            "Local routing consistency (SRP): the best F1 score of one set of experts for a whole segment, by layer. "
            "Intervals 95 %, by document. Grey: the tokens of each document in random order. Dashed: uniform routing."
        ),
        how=(
            "Only the gap to the grey line is local: the grey line itself is what the document's favourite experts "
            "give without any order."
        ),
        cannot=(
            "It is not the hit rate of a cache of a given size: the set may have any size, and is chosen knowing the "
            "segment."
        ),
        frame=consistency_table(consistency, consistency["layer"].values.tolist()).frame,
    )


def _of_balance(balance: xr.Dataset) -> PageFigure:
    batches = "batch_imbalance" in balance and bool(balance["batches"].values.any())
    weights = "weight" in balance
    coloured = (
        " Coloured: batches of consecutive sequences (mean; band from 5 to 95 % of the batches); dashed: as many "
        "tokens drawn at random from the whole trace."
        if batches
        else ""
    )
    beside = (
        "Right: the largest gate weight of a token and its lead over the second (bands: 5 to 95 % of the tokens)."
        if weights
        else "Right: the entropy of the loads over that of equal ones."
    )
    return PageFigure(
        name="balance",
        file="balance",
        label="Balance",
        title="The busiest expert over the mean load",
        caption=(
            f"Left, squares: the whole trace, 1 being perfect balance, with 95 % interval by document.{coloured} "
            f"{beside}"
        ),
        how=(
            "The squares are what training balanced. A solid line above its dashed one: sequences favour some "
            "experts, beyond what so few tokens show by chance; that is what a batch of such sequences must wait for."
            if batches
            else "The squares are what training balanced; 2 means that the busiest expert has twice its part."
        ),
        cannot=(
            "It is of experts, not devices: how long a device waits depends on which experts lie together on it, and "
            "on capacity. It does not say that the busiest expert is the same in each batch."
        ),
        frame=frames.balance_frame(balance),
    )


def _of_coactivation(results: Results, coactivation: xr.Dataset) -> PageFigure:
    layers = list(results.paired_layers)
    return PageFigure(
        name="coactivation",
        file="coactivation",
        label="Co-activation",
        title="Experts that share a token",
        caption=(
            "How many times as often two experts are chosen for the same token as popularity alone makes them"
            f"{_of_maps(int(coactivation['num_ids'].max()))}. Under each map: the part of the pairs that would have to "
            "be others for all to be 1, and what sampling alone would give. Intervals are in the CSV."
        ),
        how=(
            "Orange pairs are called together, blue ones avoid each other. Orange blocks are groups of experts that "
            "work together; placed on one device, they spare traffic."
        ),
        cannot=(
            "It does not tell whether two experts have a tie or merely like the same domains or words. Experts "
            "of different layers have nothing in common but their number."
        ),
        frame=frames.coactivation_frame(coactivation.sel(layer=layers)),
    )


def _of_transitions(results: Results, transitions: xr.Dataset) -> PageFigure:
    first = str(transitions["choice"].values) == "first"
    goes = "a token's first choice goes" if first else "the assignments of a token go"
    return PageFigure(
        name="transitions",
        file="transitions",
        label="Transitions",
        title="From layer to layer",
        caption=(
            f"How many times as often {goes} from one expert to another as in independent layers"
            f"{_of_maps(int(transitions['num_after'].max()))}. Below: the bits that one layer's choice tells of the "
            "next one's, bias removed, with 95 % intervals by document; dashed: what sampling alone would give. Grey: "
            "independent layers would give fewer than 10 tokens; experts of which nothing can be told are left out."
        ),
        how=(
            "Bold rows of orange and blue are a road through the layers: knowing a token's expert, the next one's can "
            "be fetched early. White maps are layers that choose anew."
        ),
        cannot=(
            "It does not tell whether the choice at one layer matters to the next, or whether the identity of the "
            "token fixes both."
        ),
        frame=frames.transitions_frame(transitions, results.later_layers),
    )


def _of_maps(experts: int) -> str:
    """How a map of pairs marks what is sure."""
    return "; bold: surely not 1 (false discovery rate 5 %)" if experts <= MOST_WITH_NUMBERS else ", experts clustered"


def _of_domain_pairs(results: Results) -> PageFigure:
    divergence = results.divergence.sel(layer=list(results.layers))
    return PageFigure(
        name="pairs",
        file="domain-pairs",
        label="Pairs of domains",
        title="Divergence of any two domains",
        caption=(
            "Jensen-Shannon divergence between the shares of two domains, bits. Dot: not explained by sampling "
            "documents (false discovery rate 5 % over layers and pairs)."
        ),
        how=(
            "Light squares are groups of domains that share their experts, such as kinds of prose; a dark row and "
            "column is a domain unlike all others."
        ),
        cannot=(
            "It cannot tell topic from vocabulary or format: two domains in one notation look alike whatever they are "
            "about. With many documents even a trifle has its dot."
        ),
        frame=frames.divergence_frame(divergence).query("other != '(the others)'"),
    )


def _of_vocabulary(results: Results, vocabulary: xr.Dataset) -> PageFigure:
    return PageFigure(
        name="vocabulary",
        file="vocabulary",
        label="Vocabulary",
        title="How surely a token goes to one expert",
        caption=(
            "Share of an id's tokens that chose its most frequent expert, mean over ids of at least "
            f"{int(vocabulary.attrs['min_count'])} tokens; left by the token itself, right by the next token. Dashed: "
            "the same choices rotated within each document. Dotted: the most popular expert. Below: experts from the "
            "most to the least specialized."
        ),
        how=(
            "Far above the dashed line the layer goes by the token; near 100 % it looks words up. Where the right "
            "panel is the higher, the layer is about what comes next."
        ),
        cannot=(
            "Each id counts once, so rare ids weigh most. It does not say whether the token itself decides, or the "
            "words that usually stand before it."
        ),
        frame=vocabulary_frame(vocabulary, results.trace.vocabulary),
    )


def _of_word_classes(syntax: xr.Dataset) -> PageFigure:
    return PageFigure(
        name="classes",
        file="word-classes",
        label="Word classes",
        title="Word classes with experts of their own",
        caption=(
            "Jensen-Shannon divergence, bits, between the choices of a class of words and those of the other tokens "
            "of the same documents. Dot: not explained by sampling documents (false discovery rate 5 %)."
        ),
        how=(
            "A dark cell: the class goes its own way. Because both sides come from the same documents, domain cannot "
            "pass for syntax."
        ),
        cannot=(
            "Line breaks are one or two ids: a router that looks ids up separates them without knowing syntax. Classes "
            "overlap."
        ),
        frame=syntax_frame(syntax),
    )


def _of_cache(cache: xr.Dataset) -> PageFigure:
    return PageFigure(
        name="cache",
        file="cache",
        label="Caches",
        title="What a cache of experts would hit",
        caption=(
            "Per cent of the requests of decoding, token by token, that find their expert in a cache of each layer; "
            "left by experts it holds, all layers together; right by layer. Dashed: the tokens of each document in "
            "random order. Dotted: uniform routing. Bands and bars: 95 % over documents."
        ),
        how=(
            "From dotted to dashed is what popularity and the documents' own mix give; from dashed to the line, the "
            "order of the tokens; from LRU to the optimum, the most that a better policy could add."
        ),
        cannot=(
            "Seconds (“moescope cache --expert-bytes … --bandwidth …” tells tokens a second), what prefetching adds, "
            "or what other text would hit. The optimum knows the future."
        ),
        frame=cache_frame(cache),
    )


def _of_prefetch(prefetch: xr.Dataset) -> PageFigure:
    ahead = "lookahead" in prefetch["kind"].values
    return PageFigure(
        name="prefetch",
        file="prefetch",
        label="Prefetch",
        title="What could be loaded ahead",
        caption=(
            "Per cent of the needed experts that are among the first n that a predictor names: left by n, over the "
            "layers that all predictors reach; right by layer, n as many as a token chooses. What a predictor learns, "
            "it learns on other documents. Bands: 95 % over documents."
        ),
        how=(
            "At as many as a token chooses, nothing is loaded in vain that a perfect predictor would not load. The "
            "distance to the black line is what a predictor adds to a fixed list of popular experts."
        ),
        cannot="Whether a load finishes in time, nor what a cache already holds."
        + ("" if ahead else " The routers of later layers were not asked: “moescope record --lookahead 1,2” does."),
        frame=prefetch_frame(prefetch),
    )


def _of_parallel(parallel: xr.Dataset) -> PageFigure:
    return PageFigure(
        name="parallel",
        file="parallel",
        label="Devices",
        title=f"What this routing costs on {int(parallel.attrs['devices'])} devices",
        caption=(
            "Above: largest load of a device over the mean, by layer, experts placed in their order, for batches of "
            "prefill and decode (band: 5 to 95 % of the batches). Dashed: the same tokens in any order; dotted: "
            "uniform routing. Below: assignments dropped by capacity factor; what a batch waits for over all layers, "
            "and devices that a token reaches, by placement, on documents it was not fitted on."
        ),
        how=(
            "Dashed above dotted: popular experts share a device, and placement by load helps. Solid above dashed: "
            "locality, which placement by load cannot remove; replicas and more mixed batches help."
        ),
        cannot="Time, what a server mixes, and what a dropped token would do in later layers.",
        frame=parallel_frame(parallel),
    )


def _repeated(repeats: xr.Dataset, either: str) -> str:
    """What the panels of Figure 10 count."""
    shared = f"with an expert in common among {either}"
    if "first" not in repeats["kind"].values:
        return f"{shared}; which of the choices is the first, the trace does not say"
    first = "with the same first choice"
    return first if int(repeats["top_k"].max()) == 1 else f"{first} (left) or {shared} (right)"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
