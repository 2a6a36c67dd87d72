"""Domain specialization: divergence of pairs, information, the domain that stands out, and shares of tokens."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats
from scipy.spatial.distance import jensenshannon
from synthetic import make_counts

from moescope.cli import main
from moescope.measures import divergence, shares
from moescope.reporting import figures
from moescope.reporting.formats import render
from moescope.reporting.subjects.divergence import divergence_table, domain_pairs_table
from moescope.reporting.subjects.shares import shares_table
from moescope.tallying import tally
from moescope.trace import Counts, Header, Layer, TraceWriter, Vocabulary, open_trace


def counts_trace(path: Path, loads: np.ndarray, domain: np.ndarray, names: tuple[str, ...], layers=(0,)):
    """A trace of counts with loads by (document, layer, expert)."""
    document, layer, expert = np.nonzero(loads)
    shape = tuple(Layer(number, loads.shape[2], 1, ranked=False) for number in layers)
    header = Header(shape, token_ids=False, counts_only=True)
    counts = Counts(document, domain[document], names, np.array(layers)[layer], expert, loads[document, layer, expert])
    with TraceWriter(path, header, Vocabulary({})) as writer:
        writer.write(counts, {"documents_read": len(loads)})
        writer.finish({})
    return open_trace(path)


def drawn(rng: np.random.Generator, shares_DE: np.ndarray, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of unequal length with tastes of their own around the shares of their domain."""
    domain = np.repeat(np.arange(len(shares_DE)), documents)
    tastes = np.stack([rng.dirichlet(60 * shares_DE[d]) for d in domain])
    return rng.multinomial(rng.integers(50, 400, len(domain)), tastes)[:, None], domain


@pytest.mark.parametrize(
    ("model", "expected"),
    [("mistralai/Mixtral-8x7B-v0.1", [0.0031, 0.0037, 0.0090]), ("allenai/OLMoE-1B-7B-0924", [0.167, 0.401, 0.501])],
)
def test_the_information_about_the_domain_is_that_of_the_published_counts(
    shared_data: Path, tmp_path: Path, model: str, expected: list[float]
) -> None:
    with (shared_data / "olmoe_repo_routing_counts.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model and row["choice"] == "topk"]
    names, layers = tuple(sorted({row["domain"] for row in rows})), (0, 7, 15)
    loads = np.zeros((len(names), 3, 1 + max(int(row["expert"]) for row in rows)), np.int64)
    for row in rows:
        loads[names.index(row["domain"]), layers.index(int(row["layer"])), int(row["expert"])] = int(row["count"])
    found = divergence(tally(counts_trace(tmp_path / "c.moe", loads, np.arange(len(names)), names, layers)))
    for value, bits in zip(found["information"].values, expected, strict=True):
        assert value == pytest.approx(bits, abs=6e-4 if bits > 0.1 else 6e-5)
    assert found["information_null"].isnull().all()  # the source does not tell documents apart
    assert found["jsd_q"].isnull().all()


def test_a_pair_is_scipys_divergence_squared_and_the_tables_hold_each_pair_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    loads, domain = drawn(rng, rng.dirichlet(np.ones(6), 3), 20)
    found = divergence(tally(counts_trace(tmp_path / "c.moe", loads, domain, ("A", "B", "C"))))
    p = np.stack([loads[domain == d].sum(axis=(0, 1)) for d in range(3)])
    for a in range(3):
        for b in range(3):
            assert found["jsd"].values[a, b, 0] == pytest.approx(jensenshannon(p[a], p[b], base=2) ** 2, abs=1e-12)
    for name in ("jsd_null", "jsd_low", "jsd_high", "jsd_p", "jsd_q"):
        values = found[name].values[..., 0]
        np.testing.assert_array_equal(values, values.T)
        assert np.isnan(np.diag(values)).all()
    frame = domain_pairs_table(found, [0]).frame
    assert frame[["domain", "other"]].values.tolist() == [["A", "B"], ["A", "C"], ["B", "C"]]
    assert frame["jsd_high_bits"].tolist() == [found["jsd_high"].values[a, b, 0] for a, b in ((0, 1), (0, 2), (1, 2))]


def test_equal_domains_are_told_apart_at_the_rate_of_the_test_and_information_is_what_its_null_says(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(1)
    p = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])
    p_values, seen, null = [], [], []
    for n in range(100):
        loads, domain = drawn(rng, np.stack([p] * 4), 30)
        found = divergence(tally(counts_trace(tmp_path / f"{n}.moe", loads, domain, tuple("ABCD"))))
        p_values += [found["jsd_p"].values[0, 1, 0], found["jsd_p"].values[2, 3, 0]]  # independent pairs
        seen.append(found["information"].item())
        null.append(found["information_null"].item())
    assert (np.array(p_values) < 0.05).sum() <= 18  # of 200; at a true 5 % with probability 0.995
    assert stats.kstest(p_values, "uniform").pvalue > 0.001
    assert np.mean(null) == pytest.approx(np.mean(seen), rel=0.1)


def test_the_interval_of_a_pair_holds_the_divergence_of_its_domains(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    p = np.array([[0.3, 0.2, 0.2, 0.1, 0.1, 0.1], [0.2, 0.3, 0.1, 0.2, 0.1, 0.1]])
    truth, hits = jensenshannon(*p, base=2) ** 2, 0
    for n in range(100):
        loads, domain = drawn(rng, p, 40)
        found = divergence(tally(counts_trace(tmp_path / f"{n}.moe", loads, domain, ("A", "B"))))
        hits += bool(found["jsd_low"].values[0, 1, 0] <= truth <= found["jsd_high"].values[0, 1, 0])
    assert hits >= 90, hits


def test_a_domain_stands_out_surely_only_if_its_interval_is_above_all_others(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    even, odd = np.full(8, 1 / 8), np.array([0.4, *[0.6 / 7] * 7])
    loads, domain = drawn(rng, np.stack([even, even, odd]), 60)
    found = divergence(tally(counts_trace(tmp_path / "a.moe", loads, domain, ("A", "B", "C"))))
    assert (found["leader"].item(), found["leader_significant"].item()) == ("C", True)
    loads, domain = drawn(rng, np.stack([even] * 3), 60)
    alike = divergence(tally(counts_trace(tmp_path / "b.moe", loads, domain, ("A", "B", "C"))))
    assert not alike["leader_significant"].item()
    one = divergence(tally(counts_trace(tmp_path / "o.moe", loads, domain * 0, ("A",))))
    assert (one["leader"].item(), one["leader_significant"].item()) == ("", False)
    assert one["information"].isnull().all()


def test_the_command_prints_both_tables_and_the_figure_draws_each_pair(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    loads, domain = drawn(rng, rng.dirichlet(np.ones(6), 3), 20)
    trace = counts_trace(tmp_path / "c.moe", loads, domain, ("A", "B", "C"))
    found = divergence(tally(trace))
    result = CliRunner().invoke(main, ["divergence", str(trace.path)])
    tables = divergence_table(found, [0]), domain_pairs_table(found, [0])
    assert result.stdout == "\n".join(render(table, "text") for table in tables)
    rows = CliRunner().invoke(main, ["divergence", str(trace.path), "--format", "csv"]).stdout
    assert len(list(csv.DictReader(io.StringIO(rows)))) == 3 + 3
    mesh = figures.divergence.draw_domain_pairs(found, [0]).axes[0].collections[0].get_array()
    expected = np.where(np.eye(3, dtype=bool), np.nan, found["jsd"].values[..., 0])
    np.testing.assert_allclose(np.ma.filled(mesh, np.nan).reshape(3, 3), expected)


def test_shares_of_tokens_are_those_of_assignments_times_the_choices_of_a_token(tmp_path: Path) -> None:
    trace = make_counts(tmp_path / "c.moe", {g: {0: {0: 14 + g % 3, 1: 12 - g % 3, 2 + g % 6: 14}} for g in range(12)})
    found = shares(tally(trace))
    of_tokens, plain = (shares_table(found, [0], of=of) for of in ("tokens", "assignments"))
    assert of_tokens.sections[0].title == "layer 0: uniform 25.0"
    for row, other in zip(of_tokens.sections[0].rows, plain.sections[0].rows, strict=True):
        for cell, single in zip(row.cells, other.cells, strict=True):
            assert float(cell.value) == pytest.approx(2 * float(single.value), abs=0.2)
            if single.spread:
                assert float(cell.spread[1:]) == pytest.approx(2 * float(single.spread[1:]), abs=0.2)
    printed = CliRunner().invoke(main, ["shares", str(trace.path), "--of", "tokens"]).stdout
    assert printed == render(of_tokens, "text")


@pytest.mark.parametrize(("model", "top_k"), [("mistralai/Mixtral-8x7B-v0.1", 2), ("allenai/OLMoE-1B-7B-0924", 8)])
@pytest.mark.parametrize("choice", ["topk", "first"])
def test_shares_of_tokens_of_the_published_counts_are_the_published_definition(
    shared_data: Path, tmp_path: Path, model: str, top_k: int, choice: str
) -> None:
    """Domain specialization, OLMoE's equation 7: N_iD / N_D, of 208,896 tokens a domain."""
    with (shared_data / "olmoe_repo_routing_counts.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model and row["choice"] == choice]
    ranks = top_k if choice == "topk" else 1
    names = tuple(dict.fromkeys(row["domain"] for row in rows))
    num_experts = 1 + max(int(row["expert"]) for row in rows)
    shape = tuple(Layer(number, num_experts, ranks, ranked=False) for number in (0, 7, 15))
    cells = np.array(
        [[names.index(row["domain"]), *(int(row[name]) for name in ("layer", "expert", "count"))] for row in rows]
    )
    cells = cells[np.lexsort(cells.T[::-1])]
    domain, layer, expert, count = cells[cells[:, 3] > 0].T
    header = Header(shape, token_ids=False, counts_only=True)
    with TraceWriter(tmp_path / "t.moe", header, Vocabulary({})) as writer:
        writer.write(Counts(domain, domain, names, layer, expert, count), {"documents_read": len(names)})
        writer.finish({})
    found = shares(tally(open_trace(tmp_path / "t.moe"))).sel(choice="all")
    assert len(rows) == len(names) * 3 * num_experts
    for row in rows:
        at = found.sel(domain=row["domain"], layer=int(row["layer"]), expert=int(row["expert"]))
        assert float(at["share_of_tokens"]) == pytest.approx(int(row["count"]) / 208_896, abs=1e-12)
        assert float(at["share"]) == pytest.approx(int(row["count"]) / 208_896 / ranks, abs=1e-12)
    np.testing.assert_allclose(found["share_of_tokens"].sum("expert"), ranks)
