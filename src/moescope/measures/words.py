"""Words: whether the tokens of a word, or of indentation, go to one expert, and whether that is more than chance.

The unit is the occurrence of a word with all the tokens that overlap it, and the first choice of each token. Two
questions are kept apart. *Does the word have an expert?* compares tokens of the word from different documents. *Do the
tokens of one occurrence stay together?* compares the tokens of a word that the tokenizer cut, against what each token
id does elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from moescope.errors import NotRecorded
from moescope.measures import groups, statistics
from moescope.measures.schema import EXPERT_ID, FRACTION, described, estimate, layer_coordinates
from moescope.tallying import INDENTATION, Occurrences, Source, Tally, TokenChoices
from moescope.tallying.counted import counted
from moescope.tallying.counter import CountOptions
from moescope.tallying.document_sample import DocumentCounter
from moescope.tallying.occurrences import WordCounter
from moescope.tallying.tally import TallyCounter


def words(
    trace: Source,
    words: Sequence[str],
    *,
    indentation: bool = False,
    layers: Iterable[int] | None = None,
    threads: int | None = None,
) -> xr.Dataset:
    """Which expert a word goes to, and how often.

    Args:
        trace: The trace or its folder; or what was counted of it (`moescope.count`).
        words: Words, found as whole words with their case; of one or several tokens. Counts have theirs.
        indentation: Add a row for the spaces and tabs at the start of lines.
        layers: Layers of the trace to measure, or None for all; counts have theirs.
        threads: Parts counted at a time; None for the number of processors.
    Returns:
        Dims (word, layer); `occurrences`, `tokens`, `multi_token` (word): how many there are, and how many occurrences
        have at least two tokens; the coordinate `documents` (word): how many hold the word.

        * `top_expert`, `top_share`, `top_share_low`, `top_share_high`, `top_share_null`: the expert that most tokens of
          the word choose first, their share (clustered by document; the lower end allows for its having been picked as
          the largest), and that expert's share of all tokens;
        * `same`, `same_low`, `same_high`, `same_null`: probability that two tokens of the word, from different
          documents, have the same first choice (jackknife over documents); the same of any two tokens of the trace;
        * `together`, `together_low`, `together_high`, `together_null`: share of the occurrences of several tokens in
          which all have the same first choice; the same if each token chose as its id does in the other documents,
          independently of its neighbours. Of a trace above 1 GiB, that is of a sample of its documents.
    Raises:
        ValueError: A word is empty.
        NoSuchLayer: A layer was not recorded.
        NotRecorded: The trace has no token ids, does not say which choice is the first, or a word was not counted.
    Source:
        The claim on `self`, `Question` and indentation in Mixtral of Experts, section 5; definitions and nulls are
        ours.
    """
    asked = (*words, INDENTATION) if indentation else tuple(words)
    options = CountOptions(words=asked, ranks=1)
    counts = counted(trace, WordCounter, TallyCounter, DocumentCounter, layers=layers, options=options, threads=threads)
    of_word = counts[WordCounter].of_word
    if missing := [word for word in asked if word not in of_word]:
        have = ", ".join(of_word) or "none"
        raise NotRecorded(
            counts.path, f"the word {missing[0]!r} was not counted; those counted: {have}", "give the trace itself"
        )
    occurrences, tally = [of_word[word] for word in asked], counts[TallyCounter]
    choices = TokenChoices.of(counts[DocumentCounter], occurrences)
    chosen = [layer.layer for layer in counts.layers]
    rows = [[_judge(word, place, choices, tally, layer) for place, layer in enumerate(chosen)] for word in occurrences]
    tops, shares = (np.array([[row[part] for row in by_layer] for by_layer in rows], float) for part in (0, 1))
    dims = ("word", "layer")
    variables = {
        name: described([size(word) for word in occurrences], ("word",), long_name, units)
        for name, (size, long_name, units) in _SIZES.items()
    }
    variables["top_expert"] = described(tops, dims, "most frequent first choice of the word's tokens", EXPERT_ID)
    for place, (name, (long_name, null_name)) in enumerate(_SHARES.items()):
        value, low, high, null = np.moveaxis(shares[:, :, place], -1, 0)
        meanings = {"null": null_name}
        variables |= estimate(
            name, dims, long_name, FRACTION, meanings=meanings, value=value, low=low, high=high, null=null
        )
    documents = [len(np.unique(word.document)) for word in occurrences]
    return xr.Dataset(
        variables,
        {"word": [word.name for word in occurrences], "documents": ("word", documents, {"units": "documents"})}
        | layer_coordinates(counts.layers),
    )


_SIZES: dict[str, tuple[Callable[[Occurrences], int], str, str]] = {
    "occurrences": (lambda word: len(_lengths(word)), "how often the word was found", "occurrences"),
    "tokens": (lambda word: len(word.token_id), "tokens of its occurrences", "tokens"),
    "multi_token": (lambda word: int((_lengths(word) > 1).sum()), "occurrences of several tokens", "occurrences"),
}
"""By name: how it is counted, what it is, its unit."""

_SHARES = {
    "top_share": ("share of the word's tokens that choose it first", "share of all tokens that choose it first"),
    "same": (
        "probability that two tokens of the word, from different documents, have one first choice",
        "probability that any two tokens of the trace have one first choice",
    ),
    "together": (
        "share of the occurrences of several tokens whose tokens all have one first choice",
        "the same if each token chose as its id does in other documents",
    ),
}
"""By name: what it is, and what its null is."""


def _judge(
    word: Occurrences, place: int, choices: TokenChoices, tally: Tally, layer: int
) -> tuple[float, list[tuple[float, float, float, float]]]:
    """The top expert at a layer, the `place`-th of those counted, and each of `_SHARES` with its interval and null."""
    nothing = float("nan")
    num_ids = int(tally.data["num_ids"].sel(layer=layer))  # an expert that the layer lacks cannot be its top
    loads = tally.data["loads"].sel(layer=layer, choice="first").sum("domain").values[:num_ids].astype(float)
    same_null = float(statistics.ratio((loads * (loads - 1)).sum(), loads.sum() * (loads.sum() - 1)))
    choice = word.first_choice[place]
    made = choice >= 0
    if not made.any():
        return nothing, [(nothing,) * 4, (nothing, nothing, nothing, same_null), (nothing,) * 4]
    documents, of_document = np.unique(word.document, return_inverse=True)
    by_document = np.zeros((len(documents), len(loads)))
    np.add.at(by_document, (of_document[made], choice[made]), 1)
    top = int(by_document.sum(axis=0).argmax())
    together, together_null = _together(word, place, choices)
    return top, [
        (*_share_of_the_top(by_document, top), float((loads / loads.sum())[top])),
        (*_same_across(by_document), same_null),
        (*together, together_null),
    ]


def _clustered(y_G: NDArray[np.float64], n_G: NDArray[np.float64]) -> tuple[float, float, float]:
    """A ratio over documents with its 95 % interval."""
    used = n_G > 0
    y, n = y_G[used], n_G[used]
    of = statistics.proportion(y.sum(), n.sum(), (y * y).sum(), (y * n).sum(), (n * n).sum(), len(n))
    return float(of["value"]), float(of["low"]), float(of["high"])


def _share_of_the_top(count_GE: NDArray[np.float64], top: int) -> tuple[float, float, float]:
    """Share of the expert found on top, with a 95 % interval of its true share.

    The one of several that came out largest has been lucky, so the lower end holds for all at once that could have.

    Source:
        Chernozhukov, Lee and Rosen 2013, Econometrica 81 (contenders by adaptive selection, here with Bonferroni's
        quantiles), as `groups.interval_of_largest`.
    """
    used_GE = count_GE[count_GE.sum(axis=1) > 0]
    share_E, error_E = groups.ratio_errors(used_GE, used_GE.sum(axis=1))
    low_E, high_E = statistics.proportion_interval(share_E, error_E, len(used_GE), together=len(share_E))
    contenders = max(1, int((high_E >= low_E[top]).sum())) if np.isfinite(low_E[top]) else 1
    low, _ = statistics.proportion_interval(share_E[top], error_E[top], len(used_GE), together=contenders)
    _, high = statistics.proportion_interval(share_E[top], error_E[top], len(used_GE))
    return float(share_E[top]), float(low), float(high)


def _same_across(count_GE: NDArray[np.float64]) -> tuple[float, float, float]:
    """Probability that two tokens from different documents agree, with a jackknife interval over documents."""
    count_GE = count_GE[count_GE.sum(axis=1) > 0]
    num_documents = len(count_GE)
    nothing = float("nan")
    if num_documents < 2:
        return nothing, nothing, nothing
    n_G = count_GE.sum(axis=1)
    total_E, total = count_GE.sum(axis=0), n_G.sum()
    agree = (total_E**2).sum() - (count_GE**2).sum()
    pairs = total**2 - (n_G**2).sum()
    value = agree / pairs
    if num_documents < 3:
        return float(value), nothing, nothing
    # Without document g: the pairs that touch it are gone, in both orders.
    agree_without = agree - 2 * (count_GE * (total_E - count_GE)).sum(axis=1)
    pairs_without = pairs - 2 * n_G * (total - n_G)
    without = statistics.ratio(agree_without, pairs_without)
    error = np.sqrt((num_documents - 1) / num_documents * ((without - without.mean()) ** 2).sum())
    if error == 0 and value in (0, 1):  # every document agrees, which leaves room for documents that were not drawn
        low, high = statistics.proportion_interval(value, 0.0, num_documents)
        return float(value), float(low), float(high)
    half = float(statistics.student_t(num_documents) * error)
    return float(value), max(0.0, float(value) - half), min(1.0, float(value) + half)


def _together(word: Occurrences, place: int, choices: TokenChoices) -> tuple[tuple[float, float, float], float]:
    """Occurrences of several tokens: the share whose tokens agree, and the share that token ids alone predict."""
    nothing = float("nan")
    lengths = _lengths(word)
    several = lengths > 1
    if not several.any():
        return (nothing, nothing, nothing), nothing
    inside = np.repeat(several, lengths)
    starts = np.cumsum(lengths[several]) - lengths[several]
    choice, document = word.first_choice[place, inside], word.document[inside]
    agreed = (np.minimum.reduceat(choice, starts) == np.maximum.reduceat(choice, starts)) & (choice[starts] >= 0)
    predicted = np.multiply.reduceat(choices.elsewhere(place, word.token_id[inside], document), starts).sum(axis=1)
    documents, of_document = np.unique(document[starts], return_inverse=True)
    y_G = np.bincount(of_document, agreed.astype(float), len(documents)).astype(float)
    n_G = np.bincount(of_document, minlength=len(documents)).astype(float)
    null = float(np.nanmean(predicted)) if np.isfinite(predicted).any() else nothing
    return _clustered(y_G, n_G), null


def _lengths(word: Occurrences) -> NDArray[np.int64]:
    """Tokens of each occurrence."""
    return np.unique(word.occurrence, return_counts=True)[1]
