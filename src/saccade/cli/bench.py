"""`saccade bench`: time operators over map sizes, or masks over lengths of sequences."""

import json
import sys
from typing import Any

from saccade.cli.shared import add_json, emit, emit_table

EXAMPLE = "saccade bench --operators window,neighborhood --sides 7,14,28 --plot bench.svg"


def arguments(parser: Any) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        default="operators",
        help="operators on square maps, or masks: those of long sequences, beside dense attention and FlexAttention",
    )
    parser.add_argument("--operators", type=str | None, default=None, help="names with commas between; all by default")
    parser.add_argument("--masks", type=str | None, default=None, help="names with commas between; all by default")
    parser.add_argument(
        "--sides", type=str | None, default=None, help="tokens along each axis of the square maps: 14,28,56,112"
    )
    parser.add_argument("--lengths", type=str | None, default=None, help="tokens of the masks' sequences: 1024,4096")
    parser.add_argument("--batch", type=int, default=1, help="images or sequences at once")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--head-dim", type=int, default=32, help="channels of a head")
    parser.add_argument(
        "--backward", action="store_true", help="time operators forward and backward; masks also backward by itself"
    )
    parser.add_argument(
        "--peers",
        type=str | None,
        default=None,
        help="what masks are timed beside: dense,flex_attention,flex,triton, or none; by default the first two, on a "
        "GPU all. FlexAttention compiles half a minute a mask",
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--plot", type=str | None, default=None, help="draw time against side: FILE.svg, .png or .pdf")
    add_json(parser)


def run(args: Any) -> int:
    import torch

    from saccade.errors import InputError, check_choice

    check_choice("what", args.what, ("operators", "masks"))
    check_choice("dtype", args.dtype, ("float32", "bfloat16", "float16"))
    others = ("masks", "lengths", "peers") if args.what == "operators" else ("operators", "sides", "plot")
    for name in others:
        if getattr(args, name) is not None:
            raise InputError(f"--{name} is given to `saccade bench {args.what}`, which has no use for it. Leave it out")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"device is {args.device!r}: torch finds no such device here. Take cpu")
    sizes = {"batch": args.batch, "heads": args.heads, "head_dim": args.head_dim, "backward": args.backward}
    where = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    return (_masks if args.what == "masks" else _operators)(args, {**sizes, **where})


def _operators(args: Any, options: dict[str, Any]) -> int:
    from dataclasses import asdict

    from saccade.measure import OPERATORS, bench_operators

    sides = _numbers("sides", args.sides or "14,28,56,112")
    found = bench_operators(_names(args.operators, OPERATORS), sides, **options)
    if args.plot:
        _plot(found, args.plot)
    if args.json:
        emit(json.dumps([{**asdict(row), "speedups": row.speedups} for row in found], indent=1))
    else:
        _print_table(found, sides)
    return 0


def _masks(args: Any, options: dict[str, Any]) -> int:
    from saccade.measure import PEERS, bench_masks
    from saccade.ops import MASKS

    found = bench_masks(
        _names(args.masks, MASKS),
        _numbers("lengths", args.lengths or "1024,4096"),
        peers=None if args.peers is None else [] if args.peers == "none" else _names(args.peers, PEERS),
        progress=lambda doing: print(doing, file=sys.stderr, flush=True),
        **options,
    )
    if args.json:
        emit(json.dumps([row.as_dict() for row in found], indent=1))
        return 0
    peers = list(found[0].peers) if found else []
    beside = [f"{peer} (times ours)" for peer in peers]
    columns = ["mask", "tokens", "density", "tiles", "computed", "ours", *beside, "TFLOP/s"]
    title = "ms forward / backward; shares of pairs that may attend, of tiles with some, of pairs that we compute"
    emit_table(title, columns, (_cells(row) for row in found))
    for note in dict.fromkeys(f"{peer}: {each.note}" for row in found for peer, each in row.peers.items() if each.note):
        emit(note)
    return 0


def _cells(row: Any) -> list[str]:
    def pair(values: Any, form: str) -> str:
        return " / ".join("-" if value is None else form.format(value) for value in values)

    peers = [
        f"{pair((each.forward, each.backward), '{:.2f}')} ({pair(row.speedups(peer), '{:.1f}x')})"
        for peer, each in row.peers.items()
    ]
    ours = pair((row.tiled.forward, row.tiled.backward), "{:.2f}")
    shares = [f"{share:.3f}" for share in (row.density, row.visited, row.computed)]
    return [row.mask, str(row.length), *shares, ours, *peers, pair(row.tflops(row.tiled), "{:.3f}")]


def _names(given: str | None, known: Any) -> list[str]:
    return list(known) if given is None else [name.strip() for name in given.split(",")]


def _numbers(what: str, given: str) -> list[int]:
    from saccade.errors import InputError

    try:
        return [int(number) for number in given.split(",")]
    except ValueError:
        raise InputError(f"{what} is {given!r}: give whole numbers such as 14,28,56") from None


def _print_table(found: list[Any], sides: list[int]) -> None:
    def cells(row: Any) -> list[str]:
        bounds = ["" if bound is None else f" of {bound:.1f}x" for bound in row.bounds]
        speedups = ["" if r is None else f" ({r:.1f}x{bound})" for r, bound in zip(row.speedups, bounds)]
        growth = "" if row.exponent is None else f"side^{row.exponent.value:.1f} ± {row.exponent.error:.1f}"
        return [row.operator, *(f"{own:.2f}{ratio}" for own, ratio in zip(row.milliseconds, speedups)), growth]

    columns = ("operator", *(f"{side}x{side}" for side in sides), "growth")
    emit_table("ms a call (speed-up over dense SDPA, of what visited tiles allow)", columns, map(cells, found))


def _plot(found: list[Any], path: str) -> None:
    from matplotlib.figure import Figure

    from saccade.errors import InputError

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens along a side", ylabel="ms a call", xscale="log", yscale="log")
    for row in found:
        axes.plot(row.sides, row.milliseconds, marker="o", label=row.operator)
    axes.set_xticks(found[0].sides, [str(side) for side in found[0].sides], minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise InputError(f"plot is {path!r}: {error}") from None
