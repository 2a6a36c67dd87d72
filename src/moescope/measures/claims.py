"""The claims of section 5 of Mixtral of Experts, answered for the model of a trace.

An answer is "yes" or "no" only where an interval or a corrected test decides; "mixed" where layers or domains disagree;
"not enough data" where nothing decides. Each answer rests on effects: a size with its interval, what it is compared
with, and a p-value corrected for all the effects of all claims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from moescope.measures import schema, statistics
from moescope.measures.divergence import divergence
from moescope.measures.explain import explain
from moescope.measures.locality import locality
from moescope.measures.statistics import Numbers
from moescope.measures.words import words as measured_words
from moescope.tallying import INDENTATION, WORDS, Source
from moescope.tallying.counted import count_with, opened
from moescope.tallying.counter import CountOptions
from moescope.tallying.document_sample import DocumentCounter
from moescope.tallying.occurrences import WordCounter
from moescope.tallying.tally import TallyCounter
from moescope.trace import Trace

Answer = Literal["yes", "no", "mixed", "not enough data"]
Unit = Literal["bits", "points"]

SIGNIFICANT = 0.05
"""False discovery rate at which a difference counts as found."""

TOPIC_BITS = 0.01
"""Divergence from the other domains, bits, below which shares look alike in a figure: of eight experts, two would have
to differ by some four points each. Mixtral's own published counts lie below (I(domain; expert) 0.003 to 0.009 bits at
layers 0, 15 and 31 as counted by OLMoE's authors), OLMoE's far above (0.17 to 0.50)."""

SAME_EXPERT = 0.5
"""Chance that two tokens of a word agree from which the word has an expert: more often than not, as they do where one
expert gets some 70 % of them. Among 128 experts, 3 % may be significantly more than any two tokens show."""

FEW_POINTS = 2.0
"""Points of per cent below which an excess of repeats, or a difference of them, is next to nothing: the paper calls the
first layer close to random, whose rates lie 1.1 to 2.4 points above it (Table 5, first choice)."""

MATHEMATICS = "DM Mathematics"

SAMPLE_BYTES = 2**27
"""Memory of the documents kept: 1.7 million tokens of 32 layers x 2 choices, which two processors explain in 20 s."""


@dataclass(frozen=True)
class Effect:
    """One number that a claim rests on.

    Attributes:
        what: What is measured, and where.
        value: Its size: a number of bits, or points of per cent by which a rate is above its null.
        unit: "bits" or "points".
        low: 95 % interval, low end; None where it cannot be had, as all that follow.
        high: The same, high end.
        null: What it is compared with.
        null_value: What the null predicts: bits, or per cent.
        p_value: Of no effect. Where the largest of several is shown, of no effect in any of them (Simes 1986).
        q_value: The same with the false discovery rate controlled over all effects of all claims.
    """

    what: str
    value: float
    unit: Unit
    low: float | None
    high: float | None
    null: str
    null_value: float | None
    p_value: float | None = None
    q_value: float | None = None

    @property
    def found(self) -> bool:
        """Whether it is significantly above zero."""
        return self.value > 0 and self.q_value is not None and self.q_value < SIGNIFICANT


@dataclass(frozen=True)
class Claim:
    """One claim and what this trace says of it.

    Attributes:
        name: Short name.
        statement: The claim, in our words.
        answer: Whether it holds for this model on this corpus.
        evidence: Why, in a sentence or two.
        effects: The numbers behind the answer; none where there is not enough data.
        lead: Place in `effects` of the one the answer hangs on, to be shown where there is room for one. Of a "yes"
            that needs all of them, the smallest; that needs most, the median; else the largest. None without effects.
    """

    name: str
    statement: str
    answer: Answer
    evidence: str
    effects: tuple[Effect, ...] = ()
    lead: int | None = None


def claims(trace: Source, words: Sequence[str] = WORDS, *, threads: int | None = None) -> list[Claim]:
    """Answer each claim of section 5 for a trace, in one pass over it.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`).
        words: Words whose experts are asked for; indentation is always asked for. Counts have theirs.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        The claims in the order of the paper, and after those on consecutive tokens one of ours: whether they repeat
        more than their words would anyway. Where a trace does not tell, the claim is left out or there is not enough
        data.
    Raises:
        NoSuchDocument: Nothing has been recorded yet.
        NotRecorded: A word was not counted.
        TraceDamaged: A page fails its checksum.
    """
    source = opened(trace)
    if isinstance(source, Trace):
        source.need_documents()
        options = CountOptions(words=(*words, INDENTATION), max_bytes=SAMPLE_BYTES)
        source = count_with((TallyCounter, WordCounter, DocumentCounter), source, options=options, threads=threads)
    has_order = all(layer.ranked for layer in source.layers)
    has_text = has_order and source.header.token_ids
    has_tokens = not source.header.counts_only
    return answered(
        divergence(source),
        measured_words(source, words, indentation=True) if has_text else None,
        locality(source, threads=threads) if has_tokens else None,
        explain(source, choice="first" if has_order else "all", threads=threads) if has_tokens else None,
    )


def answered(
    divergence: xr.Dataset,
    words: xr.Dataset | None = None,
    locality: xr.Dataset | None = None,
    explained: xr.Dataset | None = None,
) -> list[Claim]:
    """Answer each claim of section 5 from the results of the measures.

    Args:
        divergence: Of `moescope.divergence`.
        words: Of `moescope.words`; None leaves out the claims about words.
        locality: Of `moescope.locality`; None if the trace does not tell what token follows what.
        explained: Of `moescope.explain`; None leaves out the bits that the domain explains.
    Returns:
        The claims, as `claims` gives them.
    Source:
        Correction: Benjamini and Hochberg 1995, over the effects of all claims. The tests of each: see
        docs/reference/measures/claims.md.
    """
    drafts = [
        _topic(divergence, explained),
        _mathematics(divergence),
        _first_and_last(divergence),
        *([] if words is None else [_word(words, name) for name in words["word"].values.tolist()]),
        *(_about_neighbours(name, statement, locality, judge) for name, (statement, judge) in _LOCALITY.items()),
    ]
    p_values = [np.nan if effect.p_value is None else effect.p_value for draft in drafts for effect in draft.effects]
    q_values = iter(statistics.false_discovery_rate(p_values).tolist())
    answers = []
    for draft in drafts:
        effects = tuple(replace(effect, q_value=_known(next(q_values))) for effect in draft.effects)
        answer = draft.decide(effects)
        answers.append(Claim(draft.name, draft.statement, answer, draft.evidence, effects, _lead(draft, answer)))
    return answers


@dataclass(frozen=True)
class _Draft:
    """A claim before the correction, and how its effects decide it once they are corrected.

    `deciding` are the places of the effects that the answer rests on, None for all; `needs` is how many of them a yes
    takes.
    """

    name: str
    statement: str
    evidence: str
    effects: Sequence[Effect]
    decide: Callable[[Sequence[Effect]], Answer]
    deciding: tuple[int, ...] | None = None
    needs: Literal["all", "most"] = "all"


def _lead(draft: _Draft, answer: Answer) -> int | None:
    """Place of the effect that the answer hangs on."""
    places = range(len(draft.effects)) if draft.deciding is None else draft.deciding
    ascending = sorted(places, key=lambda place: draft.effects[place].value)
    if not ascending:
        return None
    if answer == "yes":
        return ascending[0 if draft.needs == "all" else (len(ascending) - 1) // 2]
    return ascending[-1]


_FEW_DOCUMENTS = "Intervals need at least two documents a domain."
_FEW_DOMAINS = "At least two domains of several documents are needed."
_FEW_LAYERS = "Fewer than three layers were recorded."


def _undecided(name: str, statement: str, why: str) -> _Draft:
    return _Draft(name, statement, why, (), lambda _: "not enough data")


def _topic(divergence: xr.Dataset, explained: xr.Dataset | None) -> _Draft:
    name = "No pattern by topic"
    statement = "The choice of experts shows no obvious pattern by topic: the domains use them alike."
    value, q = divergence["jsd_rest"], divergence["jsd_rest_q"]
    known = np.isfinite(q.values)
    if not known.any():
        return _undecided(name, statement, _FEW_DOCUMENTS)
    different = (q.values < SIGNIFICANT) & known
    large = (divergence["jsd_rest_low"].values > TOPIC_BITS) & known
    small = divergence["jsd_rest_high"].values < TOPIC_BITS
    top, of_layer = np.unravel_index(int(np.nanargmax(value.values)), value.shape)
    place = str(value["domain"].values[top]), int(value["layer"].values[of_layer])
    evidence = (
        f"{int(different.sum())} of {int(known.sum())} domain-layer pairs differ from the other domains (false "
        f"discovery rate {_percent(SIGNIFICANT, 0)}); {int(large.sum())} of them by significantly more than "
        f"{TOPIC_BITS} bits, the size that shows in a figure."
    )
    effects = [_divergence_effect(divergence, *place, float(np.nanmin(q.values)))]  # the least is that of Simes' test
    if explained is not None and (bits := _bits_of_domain(explained)):
        effects += bits
        share = explained["share"].sel(source="domain")
        layer = _top_layer(share)
        which = "the first choice" if explained.attrs["choice"] == "first" else "a choice"
        evidence += (
            f" Knowing the domain saves most at layer {layer}: {_percent(share.sel(layer=layer).item())} of the bits "
            f"of {which}."
        )

    def decide(effects: Sequence[Effect]) -> Answer:
        if large.mean() > 0.5:
            return "no"
        if (small | ~known).all():
            return "yes"
        return "mixed" if large.any() else "not enough data"

    return _Draft(name, statement, evidence, effects, decide, (0,))


def _bits_of_domain(explained: xr.Dataset) -> list[Effect]:
    """What the domain explains of the choice at the first, the middle and the last layer."""
    effects = []
    for layer in first_middle_last(explained["layer"].values.tolist()):
        domain = explained.sel(layer=layer, source="domain")
        if np.isfinite(domain["bits"]):
            what = f"domain explains, layer {layer}: {_percent(domain['share'].item())} of H(E)"
            p_value = _known(domain["bits_p"].item())
            effects.append(_in_bits(what, domain, "bits", "domains permuted over documents", p_value))
    return effects


def _mathematics(divergence: xr.Dataset) -> _Draft:
    statement = "Only DM Mathematics uses the experts a little differently from the other domains."
    name = "DM Mathematics stands out"
    value = divergence["jsd_rest"]
    if MATHEMATICS not in value["domain"].values:
        return _undecided(name, statement, f"The corpus has no domain {MATHEMATICS}.")
    q_value = divergence["jsd_rest_q"].sel(domain=MATHEMATICS).values
    if not np.isfinite(q_value).any():
        return _undecided(name, statement, _FEW_DOCUMENTS)
    leader = value.fillna(-1).argmax("domain").values
    leads = value["domain"].values[leader] == MATHEMATICS
    different = q_value < SIGNIFICANT
    rank = (value.values > value.sel(domain=MATHEMATICS).values[None]).sum(axis=0) + 1
    evidence = (
        f"It differs from the others at {int(different.sum())} of {len(leads)} layers (false discovery rate "
        f"{_percent(SIGNIFICANT, 0)}) and is the most different domain at {int(leads.sum())} (its rank among "
        f"{value.sizes['domain']} domains, by layer: {', '.join(map(str, rank.tolist()))})."
    )
    layer = _top_layer(value.sel(domain=MATHEMATICS))
    p_value = _simes(divergence["jsd_rest_p"].sel(domain=MATHEMATICS).values)
    stands_out = leads & different

    def decide(effects: Sequence[Effect]) -> Answer:
        return "yes" if stands_out.mean() > 0.5 else "mixed" if stands_out.any() else "no"

    effect = _divergence_effect(divergence, MATHEMATICS, layer, p_value)
    return _Draft(name, statement, evidence, (effect,), decide)


def _first_and_last(divergence: xr.Dataset) -> _Draft:
    statement = "Domains differ most at the first and last layer, whose states are close to input and output."
    name = "First and last layer differ most"
    layers = divergence["layer"].values.tolist()
    if len(layers) < 3:
        return _undecided(name, statement, _FEW_LAYERS)
    names = ("jsd_rest", "jsd_rest_null", "jsd_rest_low", "jsd_rest_high")
    value, null, low, high = (divergence[name].transpose("layer", "domain").values for name in names)
    known = np.isfinite(value + null + low + high).all(axis=0)
    if not known.any():
        return _undecided(name, statement, _FEW_DOMAINS)
    value, null, low, high = (table[:, known] for table in (value, null, low, high))
    above = (value - null).mean(axis=1)
    error = np.sqrt((_standard_error(value, low, high) ** 2).sum(axis=1)) / known.sum()
    inner = slice(1, -1)
    middle, middle_error = float(above[inner].mean()), float(np.sqrt((error[inner] ** 2).sum())) / (len(layers) - 2)
    effects = []
    for end, layer in ((0, layers[0]), (-1, layers[-1])):
        beyond = float(above[end]) - middle
        of_both = float(np.hypot(error[end], middle_error))
        half = float(stats.norm.ppf((1 + statistics.CONFIDENCE) / 2)) * of_both
        p_value = float(2 * stats.norm.sf(abs(beyond) / of_both)) if of_both > 0 else None
        what = f"divergence of a domain, layer {layer} less the layers between"
        bounds = beyond - half, beyond + half
        effects.append(Effect(what, beyond, "bits", *bounds, "mean of the layers between", middle, p_value))
    order = [layers[place] for place in np.argsort(-above, kind="stable")]
    evidence = (
        "Mean divergence of a domain from the others beyond sampling, bits: "
        f"{above[0]:.4f} at layer {layers[0]}, {middle:.4f} between, {above[-1]:.4f} at layer {layers[-1]}; largest at "
        f"layers {order[0]} and {order[1]}."
    )
    return _Draft(name, statement, evidence, effects, lambda effects: _all_found(effects, TOPIC_BITS))


def _word(words: xr.Dataset, name: str) -> _Draft:
    row = words.sel(word=name)
    what = "Indentation" if name == INDENTATION else f"The word “{name}”"
    statement = f"{what} goes to the same expert wherever it stands."
    title = f"{what} has an expert"
    if not np.isfinite(row["same_low"]).any():
        number = f"{_count(row['occurrences'], 'occurrence')} in {_count(row['documents'], 'document')}"
        return _undecided(title, statement, f"{number}; at least three documents are needed.")
    above = row["same_low"].values > row["same_null"].values
    likely = above & (row["same_low"].values > SAME_EXPERT)
    layer = _top_layer(row["same"] - row["same_null"])
    top = row.sel(layer=layer)
    evidence = (
        f"Two of its tokens from different documents have the same first choice significantly more often than any two "
        f"tokens at {int(above.sum())} of {len(above)} layers, and in significantly more than half of the cases at "
        f"{int(likely.sum())} ({_count(row['occurrences'], 'occurrence')}, {_count(row['documents'], 'document')}). "
        f"Most at layer {layer}: {_percent(top['same'].item())} ({_percent(top['same_low'].item())} to "
        f"{_percent(top['same_high'].item())}) against {_percent(top['same_null'].item())}; "
        f"{_percent(top['top_share'].item())} go to expert {int(top['top_expert'])}."
    )
    several = int(row["multi_token"])
    if several and np.isfinite(top["together"]):
        evidence += (
            f" Of its {several} occurrences of several tokens, {_percent(top['together'].item())} stay with one expert "
            f"there; token ids alone predict {_percent(top['together_null'].item())}."
        )
    documents = int(row["documents"])
    effects = []
    for layer in first_middle_last(row["layer"].values.tolist()):
        same, low, high, null = (row[f"same{end}"].sel(layer=layer).item() for end in ("", "_low", "_high", "_null"))
        if isfinite(low):
            error = float(_standard_error(same, low, high, documents))
            p_value = _student_p(same - null, error, documents - 1)
            what = f"two documents agree, layer {layer}"
            effects.append(_points(what, same, null, low - null, high - null, "any two tokens", p_value))

    def decide(effects: Sequence[Effect]) -> Answer:
        if above.any():
            return "yes" if likely.mean() > 0.5 else "mixed"
        return "no" if (row["same_high"].values < SAME_EXPERT).all() else "not enough data"

    return _Draft(title, statement, evidence, effects, decide, needs="most")


NULLS = {
    "uniform": "uniform routing",
    "popularity": "popularity in the domain",
    "document": "document in any order",
    "words": "same words elsewhere",
}
"""What neighbours are compared with: the paper's null, two that know more and more of the experts' use, the words."""


def _about_neighbours(name: str, statement: str, locality: xr.Dataset | None, judge: Judge) -> _Draft:
    """A claim about consecutive tokens, which not every trace can tell."""
    if locality is None:
        return _undecided(name, statement, "The trace holds counts, not the order of tokens.")
    kind = "first" if locality["rate"].sel(kind="first").notnull().any() else "any"
    of_kind = locality.sel(pairs="all", kind=kind)
    whole = schema.total(of_kind)
    if not np.isfinite(whole["excess_low"].sel(null="uniform")).any():
        pairs = int(whole["pairs_counted"])
        why = "Intervals need at least two documents." if pairs else "No sequence has two tokens."
        return _undecided(name, statement, why)
    return judge(name, statement, of_kind)


def _in_words(null: str) -> str:
    return NULLS[null] if null == "uniform" else f"the {NULLS[null]}"


def _repeat(name: str, statement: str, locality: xr.Dataset) -> _Draft:
    whole = schema.total(locality)
    layers = whole["layer"].values.tolist()
    above = (whole["excess_low"].sel(null="popularity") > 0).values
    layer = _top_layer(whole["excess"].sel(null="popularity"))
    row = whole.sel(layer=layer)
    pairs = "the same first choice" if str(row["kind"].values) == "first" else "an expert in common"
    nulls = ("uniform", "popularity", "document")
    over = ", ".join(f"{_signed(row['excess'].sel(null=null).item())} points over {_in_words(null)}" for null in nulls)
    evidence = (
        f"Neighbours have {pairs} significantly more often than the popularity of the experts in their domain gives at "
        f"{int(above.sum())} of {len(above)} layers. Most at layer {layer}: {_percent(row['rate'].item())} of the "
        f"pairs, {over}."
    )
    effects = [
        _excess(whole, layer, null)
        for layer in first_middle_last(layers)
        for null in nulls
        if np.isfinite(whole["excess"].sel(layer=layer, null=null))
    ]
    deciding = tuple(place for place, effect in enumerate(effects) if effect.null == NULLS["popularity"])
    return _Draft(name, statement, evidence, effects, lambda _: _above(whole.sel(null="popularity")), deciding)


def _above(against_null: xr.Dataset) -> Answer:
    """Whether the excess over a null is significantly above zero at most layers, or next to nothing at all of them."""
    above = against_null["excess_low"].values > 0
    small = 100 * against_null["excess_high"].values < FEW_POINTS
    if above.any():
        return "yes" if above.mean() > 0.9 else "mixed"
    return "no" if small.all() else "not enough data"


def _beyond_words(name: str, statement: str, locality: xr.Dataset) -> _Draft:
    whole = schema.total(locality)
    over_words = whole.sel(null="words")
    if not np.isfinite(over_words["excess_low"]).any():
        return _undecided(name, statement, "The trace has no token ids, or no word is in two documents.")
    above, below = (over_words["excess_low"] > 0).values, (over_words["excess_high"] < 0).values
    shown = first_middle_last(whole["layer"].values[np.isfinite(over_words["excess"].values)].tolist())

    def points(layer: int) -> str:
        row = over_words.sel(layer=layer)
        excess, low, high = (_signed(row[name].item()) for name in ("excess", "excess_low", "excess_high"))
        return f"{excess} points [{low} to {high}] at layer {layer}"

    evidence = (
        f"More than these words would do anyway: {', '.join(map(points, shown))}. "
        f"Significantly more at {int(above.sum())} and less at {int(below.sum())} of {len(above)} layers."
    )
    effects = [_excess(whole, layer, "words") for layer in shown]
    return _Draft(name, statement, evidence, effects, lambda _: _above(over_words))


def _grows(name: str, statement: str, locality: xr.Dataset) -> _Draft:
    whole = schema.total(locality)
    layers = whole["layer"].values.tolist()
    if len(layers) < 3:
        return _undecided(name, statement, _FEW_LAYERS)
    places = first_middle_last(layers)
    nulls = [null for null in ("popularity", "words") if np.isfinite(whole["excess"].sel(null=null)).all()]
    if "popularity" not in nulls:
        return _undecided(name, statement, "A layer has no choices to compare.")
    effects, sentences = [], []
    for null in nulls:
        first, *later = (whole.sel(null=null, layer=layer) for layer in places)
        effects += [_growth(first, row, int(whole["documents"])) for row in later]
        excess = ", ".join(f"{_signed(row['excess'].item())} at layer {int(row['layer'])}" for row in (first, *later))
        sentences.append(f"over {_in_words(null)}, {excess}")
    evidence = f"Points of repeats {'; '.join(sentences)}."
    return _Draft(name, statement, evidence, effects, lambda effects: _all_found(effects[:2], FEW_POINTS), (0, 1))


def _growth(first: xr.Dataset, later: xr.Dataset, documents: int) -> Effect:
    """How much larger an excess is at a later layer. Layers taken as independent, which widens the interval."""
    of_first, of_later = (
        _standard_error(row["excess"].item(), row["excess_low"].item(), row["excess_high"].item(), documents)
        for row in (first, later)
    )
    value = later["excess"].item() - first["excess"].item()
    error = float(np.hypot(of_first, of_later))
    half = float(statistics.student_t(documents)) * error
    what = f"excess at layer {int(later['layer'])} less that at layer {int(first['layer'])}"
    against = f"layer {int(first['layer'])}, both over {_in_words(str(first['null'].values))}"
    low, high = (_known(100 * (value + sign * half)) for sign in (-1, 1))
    return Effect(what, 100 * value, "points", low, high, against, None, _student_p(value, error, documents - 1))


def _by_domain(name: str, statement: str, locality: xr.Dataset) -> _Draft:
    rates = schema.by_domain(locality)
    enough = np.isfinite(rates["rate_low"].transpose("layer", "domain").values).all(axis=0)
    if enough.sum() < 2:
        return _undecided(name, statement, _FEW_DOMAINS)
    rates = rates.isel(domain=enough)
    ends = ("rate", "rate_low", "rate_high")
    of_rates = _differences(rates, ends, "largest difference between domains")
    different = statistics.false_discovery_rate(of_rates.p_values) < SIGNIFICANT
    row = rates.sel(layer=of_rates.layer)
    order = row["rate"].values.argsort()
    most, least = (
        f"{rates['domain'].values[place]} "
        + "{} ({} to {})".format(*(_percent(row[name].values[place]) for name in ends))
        for place in (order[-1], order[0])
    )
    evidence = (
        f"The rates of the domains differ at {int(different.sum())} of {len(different)} layers (Welch's test, false "
        f"discovery rate {_percent(SIGNIFICANT, 0)}). Most at layer {of_rates.layer}: {most}, {least}."
    )
    effects = [of_rates.effect]
    over_words = rates.sel(null="words")
    if np.isfinite(over_words["excess_low"]).all():
        names = ("excess", "excess_low", "excess_high")
        effects.append(_differences(over_words, names, f"the same of what is over {_in_words('words')}").effect)

    def decide(effects: Sequence[Effect]) -> Answer:
        if different.any():
            return "yes" if different.mean() > 0.5 else "mixed"
        return "no" if (effects[0].high or FEW_POINTS) < FEW_POINTS else "not enough data"

    return _Draft(name, statement, evidence, effects, decide, (0,))


@dataclass(frozen=True)
class _Differences:
    """How domains differ: by Welch's test at each layer, and the two furthest apart, at the layer where they are so."""

    p_values: Numbers
    layer: int
    effect: Effect


def _differences(rates: xr.Dataset, names: Sequence[str], what: str) -> _Differences:
    """Compare the domains by a value and the ends of its interval, parts of 1; `what` names the largest difference.

    Its interval allows for its being the largest of its layer (Bonferroni).
    """
    value, low, high = (rates[name].transpose("layer", "domain").values for name in names)
    documents = rates["documents"].values
    error = _standard_error(value, low, high, documents)
    p_values = np.array([welch(value_D, error_D, documents) for value_D, error_D in zip(value, error, strict=True)])
    place = int(np.argmax(value.max(axis=1) - value.min(axis=1)))
    value_D, error_D, layer = value[place], error[place], int(rates["layer"].values[place])
    most, least = int(value_D.argmax()), int(value_D.argmin())
    difference = float(value_D[most] - value_D[least])
    pairs = value.shape[1] * (value.shape[1] - 1) / 2
    degrees = max(1, int(documents[[most, least]].min()) - 1)
    t = float(stats.t.ppf(1 - (1 - statistics.CONFIDENCE) / 2 / pairs, degrees))
    half = t * float(np.hypot(error_D[most], error_D[least]))
    ends = 100 * (difference - half), 100 * (difference + half)
    p_value = _simes(p_values)
    effect = Effect(f"{what}, layer {layer}", 100 * difference, "points", *ends, "domains alike", None, p_value)
    return _Differences(p_values, layer, effect)


def welch(value_D: Numbers, error_D: Numbers, documents_D: NDArray[np.int64]) -> float:
    """P-value that groups have the same mean, whatever their variances.

    Args:
        value_D: Mean of each group.
        error_D: Its standard error.
        documents_D: Observations of each group.
    Returns:
        NaN where an error is zero or not known.
    Source:
        Welch 1951, On the comparison of several mean values.

    Example:
        >>> round(welch(np.array([0.0, 1.0]), np.array([0.3, 0.4]), np.array([10, 10])), 4)
        0.062
    """
    groups = len(value_D)
    if groups < 2 or not (np.isfinite(value_D).all() and (error_D > 0).all()):
        return float("nan")
    weight = 1 / error_D**2
    mean = (weight * value_D).sum() / weight.sum()
    between = (weight * (value_D - mean) ** 2).sum() / (groups - 1)
    spare = ((1 - weight / weight.sum()) ** 2 / np.maximum(documents_D - 1, 1)).sum()
    statistic = between / (1 + 2 * (groups - 2) / (groups**2 - 1) * spare)
    return float(stats.f.sf(statistic, groups - 1, (groups**2 - 1) / (3 * spare)))


Judge = Callable[[str, str, xr.Dataset], _Draft]
_LOCALITY: dict[str, tuple[str, Judge]] = {
    "Consecutive tokens repeat": (
        "Consecutive tokens are sent to the same expert more often than at random.",
        _repeat,
    ),
    "They repeat beyond their words": (
        "Consecutive tokens are sent to the same expert more often than the same words are elsewhere. (Ours: the paper "
        "compares with uniform routing only.)",
        _beyond_words,
    ),
    "Repetition grows with depth": (
        "Repetition is close to random at the first layer and far above it at the middle and the last.",
        _grows,
    ),
    "Repetition depends on the domain": (
        "How often assignments repeat depends on the domain; code and mathematics differ from prose in it.",
        _by_domain,
    ),
}


def first_middle_last(layers: Sequence[int]) -> tuple[int, ...]:
    """Three of the layers, or all if they are fewer.

    Example:
        >>> first_middle_last(range(32)), first_middle_last([4, 9])
        ((0, 15, 31), (4, 9))
    """
    if len(layers) <= 3:
        return tuple(layers)
    return layers[0], layers[(len(layers) - 1) // 2], layers[-1]


def _excess(whole: xr.Dataset, layer: int, null: str) -> Effect:
    names = ("rate", "rate_null", "excess_low", "excess_high", "excess_p")
    row = whole.sel(layer=layer, null=null)
    rate, expected, low, high, p_value = (row[name].item() for name in names)
    return _points(f"repeats at layer {layer}", rate, expected, low, high, NULLS[null], p_value)


def _points(
    what: str, rate: float, expected: float, low: float, high: float, null: str, p_value: float | None
) -> Effect:
    """A rate above its null, in points; `low` and `high` are of the difference."""
    low_points, high_points, null_points = (_known(100 * part) for part in (low, high, expected))
    p_value = None if p_value is None else _known(p_value)
    return Effect(what, 100 * (rate - expected), "points", low_points, high_points, null, null_points, p_value)


def _divergence_effect(divergence: xr.Dataset, domain: str, layer: int, p_value: float | None) -> Effect:
    what = f"divergence from the others, largest: {domain}, layer {layer}"
    place = divergence.sel(domain=domain, layer=layer)
    return _in_bits(what, place, "jsd_rest", "sampling documents alone", p_value)


def _in_bits(what: str, place: xr.Dataset, name: str, null: str, p_value: float | None) -> Effect:
    """A value in bits with what stands beside it at one place of a result."""
    low, high, expected = (_known(place[f"{name}_{end}"].item()) for end in ("low", "high", "null"))
    return Effect(what, place[name].item(), "bits", low, high, null, expected, p_value)


def _all_found(effects: Sequence[Effect], small: float) -> Answer:
    """Whether all effects are found, or none is and each is significantly below a size that is next to nothing."""
    found = [effect.found for effect in effects]
    if any(found):
        return "yes" if all(found) else "mixed"
    return "no" if all(effect.high is not None and effect.high < small for effect in effects) else "not enough data"


def _count(number: xr.DataArray, noun: str) -> str:
    return f"{int(number):,} {noun}{'s' * (int(number) != 1)}"


def _simes(p_values: Numbers) -> float | None:
    """P-value that none of the effects is there (Simes 1986); None where none was tested."""
    adjusted = statistics.false_discovery_rate(p_values)
    return float(np.nanmin(adjusted)) if np.isfinite(adjusted).any() else None


def _standard_error(value: ArrayLike, low: ArrayLike, high: ArrayLike, documents: ArrayLike = np.inf) -> Numbers:
    """The error behind an interval of Student's t, from its longer side."""
    error: Numbers = np.maximum(np.subtract(high, value), np.subtract(value, low)) / statistics.student_t(documents)
    return error


def _student_p(value: float, error: float, degrees: int) -> float | None:
    return float(2 * stats.t.sf(abs(value) / error, max(degrees, 1))) if error > 0 else None


def _signed(difference: float) -> str:
    """A difference of rates in points, with its sign unless it rounds to nothing."""
    text = f"{100 * abs(difference):.1f}"
    return text if text == "0.0" else f"{'+' if difference > 0 else '−'}{text}"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _known(value: float) -> float | None:
    return value if isfinite(value) else None


def _top_layer(by_layer: xr.DataArray) -> int:
    return int(by_layer["layer"].values[int(np.nanargmax(by_layer.values))])
