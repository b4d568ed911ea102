"""Verbalization: laws of sentences and of their reading, images, errors, the recorded cases."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from saccade.errors import InputError
from saccade.explain import check_sentences, verbalize, verbalize_map
from saccade.explain.verbalization import Wording, list_filters, name_cells, score_regions

RECORDED = Path(__file__).parents[1] / "recorded" / "verbalization"
CASES = json.loads((RECORDED / "open.json").read_text())["cases"]


def make_scores(seed, count):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, generator=rng, dtype=torch.float64)
    words = ["the", "film", "is", "a", "fine", "one", ".", "but", "not", "so"]
    return scores, [words[i] for i in torch.randint(len(words), (count,), generator=rng)]


def search_all(scores, limit):
    """Groups of 2 or 3 tokens within five, without a score below 0, whose mean beats the limit, from the definition."""
    from itertools import combinations

    scaled = scores / scores.max()
    groups = (g for k in (2, 3) for g in combinations(range(len(scores)), k) if g[-1] - g[0] < 5)
    return {g for g in groups if min(scaled[list(g)]) >= 0 and scaled[list(g)].mean() > limit}


@given(seed=st.integers(0, 2**31 - 1), count=st.integers(1, 40), sign=st.sampled_from(["+", None]))
def test_every_span_beats_the_threshold_and_every_percentage_recomputes(seed, count, sign):
    scores, words = make_scores(seed, count)
    found = verbalize(scores, words, sign=sign, quantile=0.0)
    for span in found.spans:
        taken = scores[list(span.indices)]
        assert taken.mean() / scores.max() > found.threshold
        assert span.share == taken.sum().item() / scores.clamp(min=0).sum().item()
        assert list(span.indices) == list(range(span.indices[0], span.indices[-1] + 1))
    assert all(statement.holds for statement in found.check(scores))
    assert len(found.check()) == len(found.spans)
    shares = [span.share for span in found.spans]
    assert shares == sorted(shares, reverse=True)


@given(seed=st.integers(0, 2**31 - 1), factor=st.floats(1e-3, 1e3))
def test_a_factor_changes_nothing(seed, factor):
    scores, words = make_scores(seed, 23)
    assert verbalize(factor * scores, words).text == verbalize(scores, words).text


def test_the_search_finds_what_the_definition_gives():
    scores, words = make_scores(3, 17)
    found = verbalize(scores, words)
    assert set(found.candidates["convolution"]) == search_all(scores, found.threshold)


def test_the_last_window_is_searched():
    found = verbalize([0.0] * 9 + [1.0, 1.0], ["x"] * 11)
    assert found.spans[0].indices == (9, 10)  # and not 8, which speaks for nothing
    coded = verbalize([0.0] * 9 + [1.0, 1.0], ["x"] * 11, form="coded")
    assert (9, 10) not in coded.candidates["convolution"]


@pytest.mark.parametrize("length", [5, 11])
def test_windows_may_hang_over_the_ends(length):
    found = verbalize([1.0, 0.9, 0.8, -9.0], ["x"] * 4, value=1.0, filter_length=length)
    assert (0, 1, 2) in found.candidates["span"]  # the ones of the filter 0 1 1 1 0
    assert {(0, 1), (0, 2), (1, 2)} <= set(found.candidates["convolution"])


def test_a_run_below_the_threshold_falls_apart_at_its_weakest_token():
    scores = [10.0, 1.0, 1.0, 9.0, 0.0, 0.0, 0.0, 0.0]
    found = verbalize(scores, list("abcdefgh"), quantile=0.0, value=0.25)
    assert [span.indices for span in found.spans] == [(0,)]  # the threshold is the mean of 10 and 9
    found = verbalize(scores, list("abcdefgh"), quantile=0.0)
    assert [span.indices for span in found.spans] == [(0,), (3,)]


def test_the_threshold_is_not_below_0():
    scores = [0.0, 0.0, 1.0, *[-9.0] * 8]
    assert [span.indices for span in verbalize(scores, ["x"] * 11, quantile=0.0).spans] == [(2,)]


@pytest.mark.parametrize("scores", [[0.0] * 7, [-1.0, -3.0, -2.0], [2.0] * 6, [5.0]])
def test_nothing_stands_out(scores):
    found = verbalize(scores, ["x"] * len(scores))
    assert (found.text, found.spans, found.check()) == ("No word stands out.", (), ())


@pytest.mark.parametrize("case", range(len(CASES)))
def test_recorded_cases_in_the_coded_form(case):
    record = CASES[case]
    scores = load_file(RECORDED / "open.safetensors")[f"in.{case}.attributions"]
    metric = {"quantile": "deviation"}.get(record["metric"]["name"], record["metric"]["name"])
    wording = Wording(
        "The {kind} » {quote} « is most important for the prediction", "The {kind} » {quote} « is also", ""
    )
    options = {"metric": metric, "value": record["metric"]["value"], "sign": record["sgn"], "wording": wording}
    found = verbalize(scores, record["words"], form="coded", **options)
    for name, theirs in (("convolution", "convolution search"), ("span", "span search")):
        groups = sorted(found.candidates[name].items(), reverse=True)
        assert [list(group) for group, _ in groups] == record["out"][theirs]["indices"]
        assert [value for _, value in groups] == pytest.approx(
            [v for (v,) in record["out"][theirs]["values"]], abs=1e-6
        )
    assert found.text == record["out"]["summary"]
    lines = [f"Token '{s.names[0]}' with {round(s.percent, 2)}% of prediction score" for s in found.list_parts(6)]
    assert lines == record["out"]["total order"]
    assert all(statement.holds for statement in check_sentences(" ".join(lines), scores, record["words"]))


def test_filters_are_counted():
    assert {length: len(list_filters(length)["convolution"]) for length in (3, 5, 7)} == {3: 0, 5: 20, 7: 112}
    assert list_filters(7)["span"] == [(2, 3, 4), (1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5, 6)]


# reading


@pytest.mark.parametrize(
    ("text", "quote", "actual", "holds"),
    [
        ("» fine film « has 50 %", "fine film", 50.0, True),
        ("“film” alone: 37.5%.", "film", 37.5, True),
        ('38 percent come from "film".', "film", 37.5, True),
        ("'fine' has 12.6 %", "fine", 12.5, False),
        ("'a' and 'fine' have 25.0 per cent", "a, fine", 25.0, True),
        ("'fine a' has 12.5 %", "fine a", None, False),  # no such run
        ("It is 40 % sure", "", None, False),
        ("'so' has 37.5 %", "so", 37.5, True),  # of two places, the nearer one
        ("'not' has -12.5 %", "not", -12.5, True),
    ],
)
def test_percentages_are_read_back(text, quote, actual, holds):
    names, scores = ["a", "fine", "film", "so", "not", "so"], [1.0, 1.0, 3.0, 0.0, -1.0, 3.0]
    (statement,) = check_sentences(text, scores, names)
    assert (statement.quote, statement.actual, statement.holds) == (quote, actual, holds)


def test_a_forged_percentage_is_caught():
    scores, words = make_scores(0, 30)
    found = verbalize(scores, words)
    forged = found.text.replace(f"{found.spans[0].percent:.2f}", f"{found.spans[0].percent + 0.02:.2f}")
    assert not check_sentences(forged, scores, words)[0].holds


def test_percentages_inside_quotes_are_words():
    (statement,) = check_sentences("» 50 % off « has 75.00 %", [3.0, 1.0], ["50 % off", "x"])
    assert statement.holds


# images


@given(seed=st.integers(0, 2**31 - 1), grid=st.sampled_from([1, 2, 3, 5, 7, (2, 4)]))
def test_shares_of_a_map_recompute_from_its_pixels(seed, grid):
    map = torch.randn(9, 11, generator=torch.Generator().manual_seed(seed)).cumsum(0)
    found = verbalize_map(map, grid=grid, quantile=0.0)
    positive = map.double().clamp(min=0)
    for span in found.spans:
        inside = torch.isin(found.regions, torch.tensor(span.indices))
        assert span.share == pytest.approx((positive[inside].sum() / positive.sum()).item(), rel=1e-12)
        assert span.value > found.threshold
    statements = found.check(map)
    assert len(statements) == len(found.spans)
    assert all(statement.holds for statement in statements)


def test_cells_are_named_by_where_they_stand():
    map = torch.zeros(10, 7)
    map[9, 3], map[0, 6] = 3.0, 1.0
    found = verbalize_map(map)
    assert found.spans[0].names == ("bottom",)
    assert found.text.startswith("Most important for the prediction: bottom, with 75.00 %")
    for sides in ((1, 1), (2, 3), (4, 5), (5, 5), (6, 2)):
        assert len(set(name_cells(*sides))) == sides[0] * sides[1]


def test_regions_that_touch_are_named_together():
    regions = torch.tensor([[0, 0, 1, 2], [0, 0, 1, 2], [3, 3, 3, 2]])
    map = torch.tensor([[0.0, 0, 5, 4], [0, 0, 5, 4], [0, 0, 0, 4]])
    names = ["grass", "dog's head", "dog", "sky"]
    found = verbalize_map(map, names, regions=regions)
    assert found.text == "Most important for the prediction: dog's head, with 45.45 % of the positive relevance."
    found = verbalize_map(map, names, regions=regions, value=1.0)  # the threshold is the mean of all four
    assert found.spans[0].names == ("dog's head", "dog")
    assert found.spans[0].share == 1


def test_a_part_does_not_stand_out_by_its_size():
    regions = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 2]])
    assert not verbalize_map(torch.full((2, 5), 0.1), list("abc"), regions=regions).spans
    assert not verbalize_map(torch.full((13, 17), 0.1), grid=4).spans


@pytest.mark.parametrize("map", [torch.zeros(5, 5), -torch.ones(4, 6), torch.ones(7, 7)])
def test_no_area_stands_out(map):
    found = verbalize_map(map)
    assert (found.text, found.spans, found.check(map)) == ("No area stands out.", (), ())


def test_negative_values_take_no_share():
    map = torch.tensor([[2.0, -5.0], [1.0, -9.0]])
    assert score_regions(map, torch.tensor([[0, 0], [1, 1]]), 3).tolist() == [2.0, 1.0, 0.0]


# errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: verbalize([1.0, 2.0], ["a"]), "1 names for 2 parts"),
        (lambda: verbalize([1.0, float("nan")], ["a", "b"]), "finite number"),
        (lambda: verbalize([1.0], "a"), "list of words"),
        (lambda: verbalize([1.0], ["a"], filter_length=4), "even length. Give 3 or 5"),
        (lambda: verbalize([1.0], ["a"], filter_length=13), "from 3 to 11"),
        (lambda: verbalize([1.0], ["a"], sign="-"), "give -scores"),
        (lambda: verbalize([1.0], ["a"], metric="median"), "metric is 'median'"),
        (lambda: verbalize([1.0], ["a"], value=40), "share of largest scores"),
        (lambda: verbalize([1.0], ["a"], quantile=75), "quantile is 75"),
        (lambda: verbalize([1.0], ["a"], form="official"), "form is 'official'"),
        (lambda: verbalize_map(torch.ones(1, 3, 3)), r"map is of shape \(1, 3, 3\)"),
        (lambda: verbalize_map(torch.ones(3, 3), grid=4), "rows of the grid is 4"),
        (lambda: verbalize_map(torch.ones(3, 3), ["a"], grid=2), "1 names for 4 parts"),
        (lambda: verbalize_map(torch.ones(1, 2), ["a", "A"], grid=(1, 2)), "two parts are called 'A'"),
        (lambda: verbalize_map(torch.ones(2, 2), regions=torch.zeros(2, 2).long()), "regions have no names"),
        (lambda: verbalize_map(torch.ones(2, 2), ["a"], regions=torch.ones(2, 2).long()), "regions hold 1 to 1"),
        (lambda: verbalize_map(torch.ones(2, 2), ["a"], regions=torch.ones(2, 3).long()), "regions are torch.int64"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(InputError, match=message):
        call()
