"""The statistics of the length experiment are right where the answer is known, and its outputs say the same."""

from __future__ import annotations

import json
from statistics import fmean

import numpy as np
import pytest
from rich.console import Console

from hforce import length
from hforce.length_report import (
    DEFINITIONS,
    FEWEST,
    FILMS,
    KIND,
    MEASURES,
    SHOWN,
    Case,
    Floats,
    LengthResult,
    at_lengths,
    comparisons,
    estimate,
    summarise,
)
from hforce.settings import SETUPS
from hforce.toy.evaluate import interval

NAN = float("nan")
LENGTHS = (5, 15, 30, 60, 120)


def drawn(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).random(shape)


def placed(column: list[float]) -> Floats:
    """One number a video as values [videos, 1, 1, 1]."""
    return np.array(column)[:, None, None, None]


@pytest.fixture(scope="module")
def result() -> LengthResult:
    """Twenty videos under all setups, every tenth value unknown."""
    cases = tuple(Case(i, tuple(FILMS)[i % 2], ("red", "blue")[: i % 2 + 1], 7 + i) for i in range(20))
    values = drawn(20, len(SETUPS), len(MEASURES), len(LENGTHS)).round(6)
    values[drawn(*values.shape, seed=1) < 0.1] = NAN
    kinds = np.array([case.kind for case in cases])
    return LengthResult(
        cases=cases,
        setups=tuple(SETUPS),
        lengths=LENGTHS,
        values=values,
        summary={kind: summarise(values[kinds == kind], tuple(SETUPS)) for kind in FILMS},
        fingerprints=dict.fromkeys(SETUPS, "f"),
        environment={"device": "cpu", "dtype": "float32"},
        config={"bench": {"seed": 7}},
    )


def test_a_length_is_the_mean_of_the_five_seconds_before_it() -> None:
    assert at_lengths([float(i) for i in range(16)], (2, 5, 15)) == [0.5, 2.0, 12.0]


def test_seconds_without_a_score_do_not_count() -> None:
    at_5, at_10 = at_lengths([1.0, None, 0.0, None, NAN, *[None] * 5], (5, 10))
    assert at_5 == 0.5
    assert np.isnan(at_10)


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    values = drawn(40)
    found = estimate(values[:, None])
    expected = interval(values.tolist(), draws=20_000)
    assert (found.mean[0], found.low[0], found.high[0]) == pytest.approx(expected, abs=0.005)
    spread = 1.96 * values.std() / np.sqrt(len(values))
    assert found.high[0] - found.low[0] == pytest.approx(2 * spread, rel=0.05)


def test_unknown_values_leave_the_estimate_of_the_known_ones() -> None:
    values = drawn(40)
    some = np.where(np.arange(40) % 4 == 0, NAN, values)
    found = estimate(np.stack([values, some, np.full(40, NAN)], axis=1))
    assert found.known.tolist() == [40, 30, 0]
    assert found.mean[1] == pytest.approx(fmean(values[np.isfinite(some)]))
    expected = interval(some.tolist(), draws=20_000)
    assert (found.mean[1], found.low[1], found.high[1]) == pytest.approx(expected, abs=0.01)
    assert np.isnan([found.mean[2], found.low[2], found.high[2]]).all()
    assert not found.clear[2]


def test_the_same_values_give_the_same_interval_in_any_company() -> None:
    values = drawn(12)
    alone, beside = estimate(values[:, None]), estimate(np.stack([drawn(12, seed=3), values], axis=1))
    assert (alone.low[0], alone.high[0]) == (beside.low[1], beside.high[1])


def test_fewer_than_six_videos_have_a_mean_and_no_interval() -> None:
    few, enough = (estimate(np.ones((count, 1))) for count in (FEWEST - 1, FEWEST))
    assert (few.mean[0], few.clear[0]) == (1, False)
    assert np.isnan(few.low[0])
    assert (enough.low[0], enough.high[0], enough.clear[0]) == (1, 1, True)


def test_a_small_difference_is_clear_because_videos_are_paired() -> None:
    """Videos differ far more than setups: only the difference within each video tells."""
    window = drawn(20)
    better = window + 0.02 + 0.001 * drawn(20, seed=1)
    paired = summarise(np.stack([better, window], axis=1)[:, :, None, None], ("sink", "window"))
    assert paired.at.low[0, 0, 0] < paired.at.mean[1, 0, 0] < paired.at.high[0, 0, 0]
    found = paired.against["sink", "window"]
    assert 0.02 < found.low[0, 0] < found.mean[0, 0] < found.high[0, 0] < 0.021
    assert found.clear[0, 0]
    mixed = summarise(np.stack([better[::-1], window], axis=1)[:, :, None, None], ("sink", "window"))
    assert mixed.against["sink", "window"].mean[0, 0] == pytest.approx(found.mean[0, 0])
    assert not mixed.against["sink", "window"].clear[0, 0]


def test_change_is_against_the_shortest_length_of_the_same_video() -> None:
    first = drawn(20)
    later = np.where(np.arange(20) < 2, NAN, first - 0.25)
    change = summarise(np.stack([first, later], axis=1)[:, None, None, :], ("window",)).change
    assert change.known[0, 0].tolist() == [20, 18]
    assert change.mean[0, 0] == pytest.approx([0, -0.25])
    assert change.clear[0, 0].tolist() == [False, True]


def test_differences_on_both_sides_of_zero_are_not_clear() -> None:
    half = drawn(10).tolist()
    found = estimate(placed([*half, *(-x for x in half)]))
    assert found.mean.item() == pytest.approx(0)
    assert found.low.item() < 0 < found.high.item()
    assert not found.clear.item()


def test_who_is_compared_with_whom() -> None:
    others = [(setup, "window") for setup in SETUPS if setup != "window"]
    assert comparisons(tuple(SETUPS)) == [*others, ("head-forcing", "uniform"), ("head-forcing", "uniform-memory")]
    assert comparisons(("uniform", "head-forcing")) == [("head-forcing", "uniform")]
    assert comparisons(("window",)) == comparisons(("sink", "full")) == []


def test_the_json_holds_all_that_its_summary_is_made_from(result: LengthResult) -> None:
    document = json.loads(length.to_json(result))
    assert document["kind"] == KIND
    assert document["definitions"] == dict(DEFINITIONS)
    assert document["lengths"] == list(LENGTHS)
    for kind in FILMS:
        videos = [video["values"] for video in document["videos"] if video["kind"] == kind]
        for measure in MEASURES:
            at = document["summary"][kind]["at"]["sink"][measure]
            change = document["summary"][kind]["change"]["sink"][measure]
            against = document["summary"][kind]["against"]["sink - window"][measure]
            for i in range(len(LENGTHS)):
                own = [(v["sink"][measure][0], v["sink"][measure][i], v["window"][measure][i]) for v in videos]
                known = [now for _, now, _ in own if now is not None]
                changes = [now - first for first, now, _ in own if None not in (first, now)]
                differences = [now - other for _, now, other in own if None not in (now, other)]
                for told, expected in ((at, known), (change, changes), (against, differences)):
                    assert told["known"][i] == len(expected)
                    assert told["mean"][i] == (pytest.approx(fmean(expected), abs=1e-6) if expected else None)
                    low, high = told["low"][i], told["high"][i]
                    assert (low is None) == (len(expected) < FEWEST)
                    assert told["clear"][i] == (low is not None and (low > 0 or high < 0))


def shown(result: LengthResult) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(length.table(result))
    return capture.get()


def test_the_table_fits_120_columns_and_says_what_was_found(result: LengthResult) -> None:
    text = shown(result)
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    for kind, told in FILMS.items():
        assert f"{kind}: {told}; 10 videos" in text
    assert [line.strip() for line in text.splitlines() if line.strip() in SHOWN] == [*SHOWN] * 2
    at, against = result.summary["hold"].at, result.summary["hold"].against["head-forcing", "window"]
    row = next(line for line in text.splitlines() if line.startswith("   head-forcing"))
    assert [float(cell) for cell in row.split()[1:6]] == pytest.approx(at.mean[0, 0], abs=5e-4)
    assert f"{against.mean[0, -1]:+.3f} [{against.low[0, -1]:+.3f}, {against.high[0, -1]:+.3f}]" in row
    for other in ("uniform", "uniform-memory"):
        row = next(line for line in text.splitlines() if line.startswith(f"   hf - {other} "))
        rival = result.summary["hold"].against["head-forcing", other]
        cells = [float(cell.rstrip("*")) for cell in row.split()[3:8]]
        assert cells == pytest.approx(rival.mean[0], abs=5e-4)
