"""One pass counts what each counter alone does; counts add up over any split and survive a file, but no hostile one."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from synthetic import make_counts, make_part, make_trace

import moescope
from moescope.errors import NotRecorded, OutputExists, TraceError, TraceNotFound
from moescope.tallying import COUNTERS, Counted, one_pass
from moescope.tallying.array_file import read, write
from moescope.tallying.balance import BalanceCounter
from moescope.tallying.counted import FORMAT, FORMAT_VERSION, count_with
from moescope.tallying.counter import CountOptions
from moescope.tallying.document_sample import DocumentCounter
from moescope.tallying.joint import CoactivationCounter, TransitionCounter
from moescope.tallying.segments import SegmentCounter
from moescope.tallying.tally import TallyCounter
from moescope.trace import Layer, Trace

LAYERS = (Layer(0, 8, 2), Layer(2, 140, 4), Layer(3, 16, 1), Layer(9, 8, 2))
DOMAINS = ("ArXiv", "Github", "Wikipedia (en)")
MEASURES = {
    "shares": moescope.shares,
    "repeats": moescope.repeats,
    "divergence": moescope.divergence,
    "words": lambda source: moescope.words(source, ["w3", "w41"]),
    "locality": moescope.locality,
    "explain": lambda source: moescope.explain(source, permutations=3),
    "vocabulary": lambda source: moescope.vocabulary(source, permutations=3, min_count=2),
    "syntax": moescope.syntax,
    "consistency": moescope.consistency,
    "distinct": moescope.distinct,
    "balance": moescope.balance,
    "coactivation": moescope.coactivation,
    "transitions": moescope.transitions,
    "cache": lambda source: moescope.cache(source, sizes=[4, 8]),
    "prefetch": moescope.prefetch,
    "parallel": lambda source: moescope.parallel(source, devices=2, prefill=16, decode=4),
}


def parts_of(numbers: list[int], layers: tuple[Layer, ...] = LAYERS, domains: tuple[str, ...] = DOMAINS, seed: int = 1):
    """Parts of three documents each; part n is the same whatever others there are."""
    return [
        make_part(
            np.random.default_rng(seed + n), layers, [30, 7, 41], domains=domains, first_document=3 * n,
            weights=layers[0].ranked, dropped=0.05,
        )
        for n in numbers
    ]  # fmt: skip


def a_trace(path: Path, layers: tuple[Layer, ...] = LAYERS, numbers: tuple[int, ...] = (0, 1, 2, 3)) -> Trace:
    return make_trace(path, parts_of(list(numbers), layers), layers)


def counted_words(trace: Trace, **options) -> Counted:
    return moescope.count(trace, words=["w3", "w41"], **options)


def alike(a: Counted, b: Counted, but: tuple[str, ...] = ()) -> None:
    """Array by array, with the type of each."""
    assert a.results.keys() == b.results.keys()
    assert (a.domains, a.layers) == (b.domains, b.layers)
    for name, result in a.results.items():
        mine, theirs = result.arrays(), b.results[name].arrays()
        assert mine.keys() == theirs.keys()
        for key in mine:
            if f"{name}/{key}" not in but:
                assert mine[key].dtype == theirs[key].dtype, (name, key)
                np.testing.assert_array_equal(mine[key], theirs[key], err_msg=f"{name}/{key}")


@pytest.mark.parametrize("threads", [1, 3])
def test_one_pass_counts_what_each_counter_counts_alone(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_pass, "COLUMNS_A_READ", 5)
    trace = a_trace(tmp_path / "t.moe")
    together = counted_words(trace, threads=threads)
    assert len(together.results) == len(COUNTERS)
    for counter in COUNTERS:
        alone = count_with((counter,), trace, options=CountOptions(words=("w3", "w41")), threads=1)
        alike(replace(together, results={counter.name: together[counter]}), alone)


@pytest.mark.parametrize("name", MEASURES)
def test_each_measure_of_a_count_is_that_of_the_trace_and_of_its_path(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "measured.moe"
    trace = moescope.open_trace(path) if path.exists() else a_trace(path)
    expected = MEASURES[name](trace)
    xr.testing.assert_identical(MEASURES[name](counted_words(trace)), expected)
    xr.testing.assert_identical(MEASURES[name](str(path)), expected)


def test_the_claims_of_a_count_are_those_of_the_trace(tmp_path: Path) -> None:
    trace = a_trace(tmp_path / "t.moe")
    assert repr(moescope.claims(moescope.count(trace))) == repr(moescope.claims(trace))


def test_counts_of_disjoint_parts_add_up_to_those_of_the_whole_in_any_order(tmp_path: Path) -> None:
    whole = counted_words(a_trace(tmp_path / "whole.moe"))
    pieces = [
        counted_words(a_trace(tmp_path / f"{n}.moe", numbers=numbers)) for n, numbers in enumerate([(0,), (1, 3), (2,)])
    ]
    # A batch does not go on from one count to the next, nor are groups of documents dealt out over both.
    batches = {f"balance/{name}" for name in BalanceCounter.result_type.__dataclass_fields__ if name.endswith("SB")}
    batches |= {"balance/imbalance_LS", "balance/imbalance_squared_LS"}
    segments = {f"segments/{key}" for key in whole[SegmentCounter].arrays()}
    for a, b, c in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        total = pieces[a] + pieces[b] + pieces[c]
        alike(total, whole, but=tuple(batches | segments))
    mine, all_ = total[SegmentCounter], whole[SegmentCounter]
    np.testing.assert_array_equal(mine.documents, all_.documents)
    for part, of_whole in zip(
        (*mine.at_least.values(), *mine.expected.values()),
        (*all_.at_least.values(), *all_.expected.values()),
        strict=True,
    ):
        np.testing.assert_array_equal(part.sum(axis=1), of_whole.sum(axis=1))
    xr.testing.assert_identical(moescope.cache(total, sizes=[8]), moescope.cache(whole, sizes=[8]))


def test_domains_that_only_one_count_has_stand_beside_the_others(tmp_path: Path) -> None:
    parts = parts_of([0], domains=("A", "B")), parts_of([1], domains=("C", "B"))
    a, b = (counted_words(make_trace(tmp_path / f"{n}.moe", of, LAYERS)) for n, of in enumerate(parts))
    total = a + b
    assert total.domains == (*a.domains, "C")
    for counts in (a, b):
        for name in counts.domains:
            mine, both = (moescope.shares(c)["documents"].sel(domain=name).item() for c in (counts, total))
            assert both == mine if name != "B" else both > mine
    sample = total[DocumentCounter]
    names = {number: sample.domain_names[code] for number, code in zip(sample.document, sample.domain, strict=True)}
    assert names == {0: "A", 1: "B", 2: "A", 3: "B", 4: "C", 5: "B"}


def test_a_sum_of_samples_is_the_sample_of_both(tmp_path: Path) -> None:
    size = 24 * 78  # bytes of one part and a half
    whole = counted_words(a_trace(tmp_path / "w.moe"), max_bytes=2 * size)
    a, b = (counted_words(a_trace(tmp_path / f"{n[0]}.moe", numbers=n), max_bytes=2 * size) for n in ((0, 2), (1, 3)))
    total = a + b
    assert total[DocumentCounter].fraction == whole[DocumentCounter].fraction < a[DocumentCounter].fraction
    for key, array in whole[DocumentCounter].arrays().items():
        np.testing.assert_array_equal(total[DocumentCounter].arrays()[key], array, err_msg=key)


def test_what_cannot_be_added_is_refused_by_name(tmp_path: Path) -> None:
    whole = counted_words(a_trace(tmp_path / "a.moe"))
    with pytest.raises(ValueError, match="document 0 is in both"):
        whole + whole
    others = {
        "layers differ": a_trace(tmp_path / "b.moe", LAYERS[:2], (5,)),
        "weights differ": make_trace(tmp_path / "c.moe", [replace(p, gate_weights={}) for p in parts_of([5])], LAYERS),
        "token_ids differ": make_trace(tmp_path / "d.moe", parts_of([5]), LAYERS, token_ids=False),
    }
    for match, trace in others.items():
        with pytest.raises(ValueError, match=match):
            whole + moescope.count(trace)
    with pytest.raises(ValueError, match="different words"):
        whole + moescope.count(a_trace(tmp_path / "e.moe", numbers=(5,)))
    with pytest.raises(ValueError, match="Segments of different lengths"):
        whole + counted_words(a_trace(tmp_path / "f.moe", numbers=(5,)), lengths=(4,))
    with pytest.raises(ValueError, match="only one of them holds balance"):
        whole + count_with((TallyCounter,), a_trace(tmp_path / "g.moe", numbers=(5,)))


def test_what_a_count_lacks_is_one_clear_error(tmp_path: Path) -> None:
    trace = a_trace(tmp_path / "t.moe")
    tally = count_with((TallyCounter,), trace)
    with pytest.raises(NotRecorded, match="hold no balance: only tally counted"):
        moescope.balance(tally)
    with pytest.raises(NotRecorded, match="'w7' was not counted; those counted: w3, w41"):
        moescope.words(counted_words(trace), ["w7"])
    few = counted_words(trace, max_bytes=24 * 78)
    with pytest.raises(NotRecorded, match="% of the documents; what is simulated token by token needs all"):
        moescope.cache(few)
    with pytest.raises(NotRecorded, match="transitions of first choices"):
        moescope.transitions(few, choice="all")
    with pytest.raises(ValueError, match="segments of 5 tokens were not counted"):
        moescope.consistency(few, lengths=[5])
    with pytest.raises(ValueError, match="layers are chosen when a trace is counted"):
        moescope.shares(few, [0])
    with pytest.raises(TypeError, match="expected a trace or the path of one, not int"):
        moescope.shares(5)  # type: ignore[arg-type]


def test_what_a_trace_does_not_have_is_not_counted_and_the_rest_is(tmp_path: Path) -> None:
    one = moescope.count(a_trace(tmp_path / "one.moe", (Layer(3, 16, 1),)))
    assert CoactivationCounter not in one
    with pytest.raises(NotRecorded, match="transitions need two layers"):
        moescope.transitions(one)
    unranked = moescope.count(a_trace(tmp_path / "u.moe", tuple(replace(layer, ranked=False) for layer in LAYERS)))
    assert unranked[TransitionCounter].choice == "all"
    with pytest.raises(NotRecorded, match="which of a token's choices is the first"):
        moescope.syntax(unranked)
    counts = moescope.count(make_counts(tmp_path / "c.moe", {0: {0: {1: 5}}}))
    assert list(counts.results) == ["tally", "balance"]
    with pytest.raises(NotRecorded, match="no token"):
        moescope.locality(counts)
    with pytest.raises(NotRecorded):
        moescope.count(make_counts(tmp_path / "c2.moe", {0: {0: {1: 5}}}), words=["a"])


@pytest.mark.parametrize("kind", ["tokens", "unranked", "counts", "phases", "few"])
def test_a_count_is_the_same_after_it_was_saved(tmp_path: Path, kind: str) -> None:
    if kind == "counts":
        trace = make_counts(tmp_path / "c.moe", {0: {0: {1: 5}, 3: {2: 7}}, 4: {0: {1: 2}, 3: {0: 3}}})
    elif kind == "unranked":
        trace = a_trace(tmp_path / "t.moe", tuple(replace(layer, ranked=False) for layer in LAYERS))
    elif kind == "phases":
        parts = [replace(p, phase=np.arange(p.num_tokens) % 2) for p in parts_of([0])]
        trace = make_trace(tmp_path / "t.moe", parts, LAYERS)
    else:
        trace = a_trace(tmp_path / "t.moe")
    counts = moescope.count(trace, max_bytes=24 * 78 if kind == "few" else None)
    counts.save(tmp_path / "a")
    again = moescope.open_counted(tmp_path / "a")
    alike(again, counts)
    assert (again.header, again.absent) == (counts.header, counts.absent)
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    xr.testing.assert_identical(moescope.shares(again), moescope.shares(counts))
    with pytest.raises(OutputExists):
        counts.save(tmp_path / "a")


def test_any_reader_of_safetensors_reads_the_arrays(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    counts = counted_words(a_trace(tmp_path / "t.moe"))
    counts.save(tmp_path / "a")
    arrays = safetensors.load_file(tmp_path / "a")
    np.testing.assert_array_equal(arrays["tally/loads"], counts[TallyCounter].data["loads"])


def test_a_damaged_or_foreign_file_is_refused_and_named(tmp_path: Path) -> None:
    file = tmp_path / "a"
    counted_words(a_trace(tmp_path / "t.moe", LAYERS[:1], (0,))).save(file)
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    bad = tmp_path / "bad"
    for cut in (0, 7, 8, 100, len(good) // 2, len(good) - 1):
        bad.write_bytes(good[:cut])
        with pytest.raises(TraceError, match="bad"):
            moescope.open_counted(bad)
    for place in [*rng.integers(0, 2000, 60), *rng.integers(0, len(good), 60)]:
        bad.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        with pytest.raises(TraceError, match="bad"):
            moescope.open_counted(bad)
    for foreign in (b"", b"PK\x03\x04" + b"x" * 99, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]"):
        bad.write_bytes(foreign)
        with pytest.raises(TraceNotFound, match=r"bad.*is not a moescope-counted"):
            moescope.open_counted(bad)
    with pytest.raises(TraceNotFound, match="no file there"):
        moescope.open_counted(tmp_path / "nothing")


def test_a_file_that_lies_is_refused_however_true_its_checksum(tmp_path: Path) -> None:
    file = tmp_path / "a"
    counted_words(a_trace(tmp_path / "t.moe", numbers=(0, 1))).save(file)
    metadata, arrays = read(file, FORMAT, FORMAT_VERSION)
    words = {key: metadata.pop(key) for key in ("format", "version")}
    assert words == {"format": FORMAT, "version": str(FORMAT_VERSION)}

    def refused(match: str, change: dict[str, str] | None = None, version: int = FORMAT_VERSION, **other) -> None:
        bad = tmp_path / "bad"
        bad.unlink(missing_ok=True)
        changed = {name.replace("__", "/"): array for name, array in other.items()}
        kept = {name: array for name, array in (arrays | changed).items() if array is not None}
        write(bad, FORMAT, version, metadata | (change or {}), kept)
        with pytest.raises(TraceError, match=match):
            moescope.open_counted(bad)

    refused("reads up to 1", version=2)
    refused("tally/loads is missing".removeprefix("tally/"), tally__loads=None)
    for name, array in arrays.items():
        key = name.replace("/", "__")
        if array.size:
            refused("cannot be what was counted", **{key: array.reshape(1, *array.shape)})
            refused(
                "cannot be what was counted",
                **{key: array.astype(np.float64 if array.dtype != np.float64 else np.int64)},
            )
        if array.dtype.kind == "i" and array.size and "token_id" not in name:
            wrong = array.copy()
            wrong.reshape(-1)[0] = -2
            refused("cannot be what was counted", **{key: wrong})
    for layer in LAYERS:
        ids = arrays[f"documents/expert_ids/{layer.layer}"].copy()
        ids[0, 0] = layer.num_ids
        refused("expected at most", **{f"documents__expert_ids__{layer.layer}": ids})
    refused("starts do not cut", documents__starts=arrays["documents/starts"] + 1)
    refused("do not hold as many", documents__parts=arrays["documents/parts"] + 1)
    refused("not among those", {"layers": "[1]"})
    refused("not among those", {"layers": "[2, 0]"})
    refused("no distinct names", {"domains": '["A", "A", "B"]'})
    refused("cannot be what was counted", {"domains": json.dumps([str(n) for n in range(10**5)])})
    refused("no counter", {"counted": '["os.system"]'})
    for key in metadata:
        refused("bad", {key: "["})
        refused("bad", {key: "5"})


def test_sums_that_no_longer_fit_32_bits_become_wider(tmp_path: Path) -> None:
    counts = counted_words(a_trace(tmp_path / "t.moe", numbers=(0,)))
    table = counts[CoactivationCounter]
    full = replace(table, pairs={layer: np.full_like(pairs, 2**31 + 5) for layer, pairs in table.pairs.items()})
    doubled = full + full
    assert {pairs.dtype for pairs in doubled.pairs.values()} == {np.dtype(np.uint64)}
    assert all((pairs == 2**32 + 10).all() for pairs in doubled.pairs.values())
    assert {pairs.dtype for pairs in (table + table).pairs.values()} == {np.dtype(np.uint32)}
    replace(counts, results={"coactivation": doubled}).save(tmp_path / "a")
    again = moescope.open_counted(tmp_path / "a")[CoactivationCounter]
    np.testing.assert_array_equal(again.pairs[0], doubled.pairs[0])
