"""The index of papers, and every claims file: what it says of itself is so, and its claims hold."""

import json
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest

from saccade.claims import check, claimed_keys, list_papers, load_paper
from saccade.errors import InputError

CARDS = Path(__file__).parents[3] / "shared" / "papers"
KEYS = claimed_keys()
CLAIMS = [(key, claim) for key in KEYS for claim in load_paper(key).claims]
KNOWN_FAILURES = {
    ("convit", "gates fall in training"): "a few hundred steps on digits are not 300 epochs of ImageNet",
    (
        "dynamic_lrp",
        "ranks pixels no worse than input times gradient",
    ): "on two convolutions it is the epsilon rule, and shares of biases by magnitude only take from it",
    ("efficient_dlm", "clean blocks change the weights less"): "two-sided attention learns less in so few steps",
    (
        "feature_complexity",
        "simple features go around blocks",
    ): "a small block reads the whole stream, and what it adds shows nearly all that the stream shows",
    (
        "feature_complexity",
        "order is stable across ridges",
    ): "a penalty of a tenth hides directions of small variance, and features that need them look complex",
    (
        "feature_guided_testing",
        "tree search and saliency come nearer",
    ): "most of what a play changes is taken back after each find, with or without a tree, and 1000 queries are "
    "some ten plays, too few for a tree to learn from",
    (
        "feature_merging",
        "copies read by random parts are found",
    ): "what reads a channel has most of the weights and counts most in its distance, so that copies which are read "
    "differently are no nearer than others",
    (
        "mp_sae",
        "hierarchy is found",
    ): "a child is there in 4 % of the activations, and an atom that serves two children is not given up again",
    (
        "mp_sae",
        "atoms are coherent but not those of one activation",
    ): "32 channels, of which 8 steps explain over 99 %, are few: both hold with 2 steps alone, in a single run",
    (
        "mp_sae",
        "rank grows with the steps",
    ): "with fewer steps training spreads 64 atoms over more of the digits; read by one dictionary the rank grows",
    (
        "multifaceted",
        "facets cover the kinds of images",
    ): "the network of ten classes knows clean digits alone: the picture of an eight, plain to the eye, is a two to it",
    (
        "normgrad",
        "early layers depend less on the class",
    ): "each channel of our small network is read at its largest value, so the gradient of its last layer already "
    "comes from a few places, and those of two classes are often the same",
    (
        "rfxg",
        "asking for the contrast does not improve the group score",
    ): "differences of less than a hundredth are within what 100 images can tell",
    (
        "sae_circuits",
        "codes tell more than means of induction heads",
    ): "where an induction head finds nothing it looks at nothing in particular, so that its mean output moves",
    (
        "sae_circuits",
        "few inputs suffice",
    ): "outputs depend on 8 numbers, so that codes of five inputs hardly repeat, in the circuit or not",
    (
        "sae_circuits",
        "induction heads are found",
    ): "codes follow the tokens too, and those that stand last on positives alone by chance look like the task",
    (
        "sae_circuits",
        "settings matter little",
    ): "50 units are two a head, so that most codes of the circuit are other heads' too",
    (
        "salient_relevance",
        "the largest tenth lies on the object",
    ): "relevance of so small a network lies on the digit already, 99 % of its largest tenth: what saliency adds "
    "around the dots can only be outside",
    ("seer", "products of means lose less than random blocks"): "means hide the token that stands out",
    (
        "verbalization",
        "spans of the coded form beat the threshold",
    ): "the coded form joins groups that beat the threshold into runs that need not",
    (
        "vmoba",
        "competing within a head loses less",
    ): "a third of the queries get no block beside their own. What all products of a query share counts when "
    "queries compete and cancels in the softmax: with the mean key taken out of all keys half of the gap is "
    "gone, in three runs of three. Long queries are not the cause, for unit queries show the same; the rest is "
    "unexplained, and trained projections may behave otherwise",
    ("volo", "digits from windows"): "fixed kernels suit small digits better",
}


def test_the_index_lists_every_paper_once():
    papers = list_papers()
    assert len(papers) == len({paper.key for paper in papers}) == 192
    assert [paper.key for paper in papers] == sorted(paper.key for paper in papers)
    for paper in papers:
        assert re.fullmatch(r"[a-z0-9_]+", paper.key)
        assert paper.title
        assert re.fullmatch(r"\d{4}(-\d{2}){0,2}", paper.published)
        assert paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{5}|\d{4}\.\d{4}", paper.arxiv)


@pytest.mark.skipif(not CARDS.is_dir(), reason="the cards of the papers are not beside the project")
def test_the_index_agrees_with_the_cards():
    for paper in list_papers():
        head = (CARDS / f"{paper.key}.md").read_text(encoding="utf-8").split("---\n")[1]
        found = dict(re.findall(r'^(\w+): *"?(.*?)"? *(?:#.*)?$', head, re.MULTILINE))
        assert (paper.title, paper.arxiv, paper.published, paper.kind) == tuple(
            found.get(name) for name in ("title", "arxiv", "published", "kind")
        )
    assert len(list(CARDS.glob("*.md"))) == 192


def test_status_follows_from_the_claims_files():
    status = {paper.key: paper.status for paper in list_papers()}
    for key in KEYS:
        assert status[key] == ("partly" if load_paper(key).missing else "works")
    assert {status[key] for key in status if key not in KEYS} == {"not yet"}


def test_claims_files_are_found_by_looking(monkeypatch, tmp_path):
    import saccade.claims

    (tmp_path / "toy_paper.py").write_text("PAPER = 1\n")
    monkeypatch.setattr(saccade.claims, "__path__", [*saccade.claims.__path__, str(tmp_path)])
    assert claimed_keys() == sorted([*KEYS, "toy_paper"])


@pytest.mark.parametrize("key", KEYS)
def test_a_claims_file_agrees_with_the_index(key):
    row = next(paper for paper in list_papers() if paper.key == key)
    paper = load_paper(key)
    assert (paper.title, paper.arxiv, paper.published) == (row.title, row.arxiv, row.published)


@pytest.mark.parametrize("key", KEYS)
def test_a_claims_file_is_whole(key):
    paper = load_paper(key)
    names = [claim.name for claim in paper.claims]
    assert len(names) == len(set(names)) > 0
    for claim in paper.claims:
        assert claim.statement.endswith("."), claim.name
        assert claim.source, claim.name
        if claim.needs:
            assert claim.measure() is None, f"{claim.name} needs {claim.needs}, but has a body"


@pytest.mark.parametrize("key", KEYS)
def test_a_paper_lives_where_it_says(key):
    for name in load_paper(key).home:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize(
    ("key", "claim"),
    [
        pytest.param(key, claim, id=f"{key}: {claim.name}", marks=[pytest.mark.slow] if claim.slow else [])
        for key, claim in CLAIMS
        if not claim.needs
    ],
)
def test_a_claim_holds(key, claim):
    outcome = check(claim)
    json.dumps(outcome.as_dict(), allow_nan=False)
    if (key, claim.name) in KNOWN_FAILURES:
        assert outcome.verdict == "fails", "it holds now: take it out of KNOWN_FAILURES"
        assert outcome.note == claim.guess
    else:
        assert outcome.verdict == "holds", f"{outcome.measured} {outcome.note}"


def test_known_failures_are_claims():
    assert KNOWN_FAILURES.keys() <= {(key, claim.name) for key, claim in CLAIMS}


def test_keys_that_have_no_claims_file():
    with pytest.raises(InputError, match="there is no paper 'halonets': did you mean halonet"):
        load_paper("halonets")
    without = next(paper.key for paper in list_papers() if paper.status == "not yet")
    with pytest.raises(InputError, match=f"{without} has no claims file yet"):
        load_paper(without)


def test_a_paper_module_imports_no_other_paper():
    for key in KEYS:
        homes = {getattr(value, "__module__", "") for value in vars(import_module(f"saccade.claims.{key}")).values()}
        assert not homes & {f"saccade.claims.{other}" for other in KEYS if other != key}
