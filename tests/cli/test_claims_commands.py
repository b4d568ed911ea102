"""`saccade papers`, `verify` and `replay`: what they print, for people and for programs, and with which status."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saccade.claims
from saccade.cli import main

RECORDED = Path(__file__).parents[1] / "recorded"

TOY = '''
from saccade.claims.framework import Paper, at_most, claim

PAPER = Paper(title="A toy", arxiv=None, published="2026-01", summary="It plays.", home=())


@claim("property", 1, source="nowhere")
def one_is_one() -> int:
    """One is one."""
    return 1


@claim("property", 1, source="nowhere", guess="somebody counted twice")
def one_is_two() -> int:
    """One is two."""
    return 2


@claim("property", 1, source="nowhere")
def nobody_can_count() -> int:
    """Nobody can count."""
    raise ValueError("lost count")


@claim("property", 1, source="nowhere", needs="an abacus")
def abacus() -> None:
    """An abacus counts."""
'''


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A paper of whose claims one holds, two fail and one needs something."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(saccade.claims, "__path__", [*saccade.claims.__path__, str(tmp_path)])
    yield "toy"
    import sys

    sys.modules.pop("saccade.claims.toy", None)
    vars(saccade.claims).pop("toy", None)


def test_papers_prints_all_with_their_status(capsys):
    assert main(["papers"]) == 0
    printed = capsys.readouterr().out
    assert "192 of 192 papers" in printed
    for words in ("halonet", "2103.12731", "partly", "works", "not yet", "vsa is still without the networks"):
        assert words in printed


@pytest.mark.parametrize("status", ["works", "partly", "not-yet"])
def test_papers_of_one_status_for_programs(status, capsys):
    assert main(["papers", "--status", status, "--json"]) == 0
    papers = json.loads(capsys.readouterr().out)
    assert {paper["status"] for paper in papers} == {status.replace("-", " ")}
    assert papers[0].keys() == {"key", "title", "arxiv", "published", "kind", "uncertain", "status", "missing"}


def test_verify_prints_published_beside_measured(capsys):
    assert main(["verify", "gna", "--fast"]) == 0
    printed = capsys.readouterr().out
    for words in ("published", "measured", "verdict", "7.515", "holds", "needs", "a B200", "0 fail"):
        assert words in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_verify_shows_failures_errors_and_needs(toy, capsys):
    assert main(["verify", toy]) == 1
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("somebody counted twice", "ValueError: lost count", "an abacus", "1 hold, 2 fail, 1 need"):
        assert words in printed


def test_verify_for_programs(toy, capsys):
    assert main(["verify", toy, "--json"]) == 1
    (paper,) = json.loads(capsys.readouterr().out)
    assert (paper["key"], paper["title"], paper["arxiv"]) == ("toy", "A toy", None)
    assert [claim["verdict"] for claim in paper["claims"]] == ["holds", "fails", "fails", "needs"]
    assert [claim["measured"] for claim in paper["claims"]] == [1, 2, None, None]


def test_verify_all_finds_every_paper(toy, monkeypatch, capsys):
    monkeypatch.setattr(saccade.claims, "__path__", [saccade.claims.__path__[-1]])
    assert main(["verify", "--all", "--json"]) == 1
    assert [paper["key"] for paper in json.loads(capsys.readouterr().out)] == ["toy"]


def test_replay_prints_differences(capsys):
    assert main(["replay", str(RECORDED / "halonet" / "open.safetensors")]) == 0
    printed = capsys.readouterr().out
    for words in ("grad.state.kv.weight", "out.y", "e-07", "all agree"):
        assert words in printed


def test_replay_for_programs(capsys):
    file = str(RECORDED / "gna" / "open.safetensors")
    assert main(["replay", file, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)[file]
    assert (result["key"], result["holds"], result["error"]) == ("gna", True, None)
    assert {"out.mask9", "out.case6.lse", "grad.in.case0.q"} <= {each["name"] for each in result["results"]}
    assert all(each["difference"] <= 1e-5 for each in result["results"])


def copy_case(name, folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    source = RECORDED / name
    tensors, record = load_file(f"{source}.safetensors"), json.loads(Path(f"{source}.json").read_text())
    save_file(tensors | changes.pop("tensors", {}), folder / "case.safetensors")
    (folder / "case.json").write_text(json.dumps(record | changes))
    return str(folder / "case.safetensors")


def test_replay_of_an_output_that_differs(tmp_path, capsys):
    file = copy_case("halonet/open", tmp_path / "halonet", tensors={"out.y": torch.zeros(2, 32, 8, 12)})
    assert main(["replay", file]) == 1
    assert "1 of 6 differ" in capsys.readouterr().out
    assert main(["replay", file, "--tolerance", "10"]) == 0


def test_replay_of_results_that_only_one_side_has(tmp_path, capsys):
    file = copy_case("halonet/open", tmp_path / "halonet", tensors={"out.more": torch.zeros(1)})
    assert main(["replay", file]) == 1
    assert "missing in ours" in capsys.readouterr().out


def test_replay_goes_on_after_a_case_that_cannot_be_replayed(tmp_path, capsys):
    network = copy_case("halonet/open", tmp_path / "halonet", **{"class": "ByobNet"})
    broken = copy_case("halonet/open", tmp_path / "odd", args="dim 32, num_heads 5")
    good = str(RECORDED / "halonet" / "open.safetensors")
    assert main(["replay", network, broken, good, "--key", "halonet"]) == 1
    printed = capsys.readouterr().out
    for words in ("replay serves HaloAttn and networks of it", "num_heads is 5", "all agree"):
        assert words in printed


def test_replay_takes_the_key_of_a_file_elsewhere(tmp_path, capsys):
    file = copy_case("halonet/open", tmp_path / "elsewhere")
    assert main(["replay", file]) == 2
    assert "there is no paper 'elsewhere'" in capsys.readouterr().err
    assert main(["replay", file, "--key", "halonet"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify"], "no paper is named"),
        (["verify", "halonets"], "there is no paper 'halonets': did you mean halonet"),
        (["replay", "nothing.safetensors"], "there is no file nothing.safetensors"),
        (["replay", str(RECORDED / "gna" / "open.safetensors"), "--key", "gan"], "there is no paper 'gan'"),
        (["replay", str(RECORDED / "gna" / "open.safetensors"), "--tolerance", "-1"], "--tolerance is -1.0"),
        (["papers", "--status", "nope"], "nope"),
    ],
)
def test_wrong_calls_say_what_to_do(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_replay_without_the_json_file(tmp_path, capsys):
    save_file({"out.y": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert main(["replay", str(tmp_path / "a.safetensors")]) == 2
    assert "a.json" in capsys.readouterr().err
