"""The calibration: its planted values are what its generators do, and a few cells of it come out right."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def calibration():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("calibration")
    sys.path.remove(str(BENCHMARKS))


KINDS = ["even", "popular", "token", "domain", "documents", "sticky"]
KINDS += ["before", "alternating", "position", "collapsed", "layer"]


def miller_madow(x: np.ndarray, e: np.ndarray, num_values: int, num_experts: int) -> float:
    joint = np.zeros((num_values, num_experts))
    np.add.at(joint, (x, e), 1)

    def entropy(counts: np.ndarray) -> float:
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log2(p)).sum() + (len(p) - 1) / (2 * counts.sum() * np.log(2)))

    return entropy(joint.sum(axis=0)) + entropy(joint.sum(axis=1)) - entropy(joint.ravel())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["1of4", "2of8"])
def test_what_is_planted_is_what_many_documents_show(calibration, kind: str, shape: str) -> None:
    generator = calibration.Generator(kind, *calibration.SHAPES[shape])
    experts, top_k = generator.num_experts, generator.top_k
    draw = generator.draw(0, 1500)
    ids, position = draw.ids[1], draw.position_T
    assert (np.sort(ids, axis=1)[:, 1:] > np.sort(ids, axis=1)[:, :-1]).all()
    first = ids[:, 0]
    tokens = len(first)
    near = 0.02 if kind == "documents" else 0.006  # documents of their own mixes: 1,500 of them are not so many
    assert np.abs(np.bincount(first, minlength=experts) / tokens - calibration.mean_first(generator)).max() < near
    loads = np.bincount(ids.ravel(), minlength=experts) / ids.size
    assert np.abs(loads - calibration.mean_either(generator)).max() < near
    if top_k == 2:
        pairs = np.zeros((experts, experts))
        np.add.at(pairs, (ids[:, 0], ids[:, 1]), 1 / tokens)
        if kind != "documents":
            assert np.abs(pairs + pairs.T - calibration.together(generator)).max() < near
    inner = position > 0
    sources = {
        "domain": draw.domain_G[draw.document_T],
        "token": draw.token_id_T,
        "previous token": np.append(-1, draw.token_id_T[:-1]),
        "previous expert": np.append(-1, first[:-1]),
        "position": np.frexp(position.astype(float))[1],
        "previous layer": draw.ids[0][:, 0],
    }
    for name, bits in calibration.bits(generator).items():
        rows = inner if name.startswith("previous ") and name != "previous layer" else np.ones(tokens, bool)
        seen = miller_madow(sources[name][rows], first[rows], 64, experts)
        assert seen == pytest.approx(bits, abs=0.004, rel=0.03), name


def test_pairs_of_sets_are_those_of_all_sets_enumerated_and_weights_are_found_again(calibration) -> None:
    from itertools import combinations

    planted = importlib.import_module("planted_routing")
    weights = np.array([0.5, 0.2, 0.1, 0.15, 0.05])
    chance = {members: np.prod(weights[list(members)]) for members in combinations(range(5), 3)}
    total = sum(chance.values())
    pairs = np.zeros((5, 5))
    for members, p in chance.items():
        for i in members:
            for j in members:
                pairs[i, j] += p / total
    found = planted.pair_inclusion(weights, 3)
    np.testing.assert_allclose(found, pairs * (1 - np.eye(5)), atol=1e-12)
    np.testing.assert_allclose(planted.inclusion(weights[None], 3)[0], np.diag(pairs), atol=1e-12)
    again = planted.weights_of(np.diag(pairs), 3)
    np.testing.assert_allclose(again, weights / weights.sum(), rtol=1e-6)


def test_a_few_draws_are_measured_kept_and_shown(calibration, tmp_path: Path) -> None:
    cells = calibration.all_cells(20, 20, ["even", "token"], ["1of4"], ["repeats", "locality"])
    for cell in cells:
        calibration.run_and_keep(cell, tmp_path)
    rows = calibration.read_rows(cells, tmp_path)
    for row in (rows["repeats, first"]["even", "1of4"], rows["locality, rate (first)"]["token", "1of4"]):
        assert calibration.holds(row) >= 70  # of 95 %: 14 or fewer of 20 has a chance of 3e-4
        assert row.estimate == pytest.approx(row.planted, abs=0.01)
    assert rows["locality, above words (first)"]["token", "1of4"].null is True
    assert rows["locality, above popularity (first)"]["token", "1of4"].null is True
    text = calibration.page(rows, 20, 20)
    assert "| token | the token id decides |" in text
    assert "## Repeats, first\n" in text
    # What is kept is read and not measured again.
    file = cells[0].file("repeats", tmp_path)
    kept = json.loads(file.read_text())
    kept["repeats, first"]["held"] = 0
    file.write_text(json.dumps(kept))
    assert calibration.run_and_keep(cells[0], tmp_path) < 1
    again = calibration.read_rows(cells, tmp_path)
    assert calibration.fails(again["repeats, first"]["even", "1of4"])
    assert "Bars missed: repeats, first, even, 1 of 4" in calibration.page(again, 20, 20)
    assert "| even | **0.2500" in calibration.page(again, 20, 20)
    # What misses a bar is drawn again with other seeds, which decide.
    (doubt,) = calibration.cells_in_doubt(cells, tmp_path)
    assert (doubt.kind, doubt.measures, doubt.first_seed, doubt.draws) == ("even", ("repeats",), 20, 1000)
    kept["repeats, first"] |= {"held": 2800, "intervals": 3000, "draws": 1000}
    kept["repeats, any"] |= {"held": 0}
    doubt.file("repeats", tmp_path).write_text(json.dumps(kept))
    decided = calibration.read_rows(cells, tmp_path)
    assert calibration.holds(decided["repeats, first"]["even", "1of4"]) == pytest.approx(93.3, abs=0.05)
    assert calibration.holds(decided["repeats, any"]["even", "1of4"]) > 70  # it was not in doubt
    assert "93.3 (of 1,000)" in calibration.page(decided, 20, 20)
