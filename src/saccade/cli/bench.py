"""`saccade bench`: time operators over map sizes, as a table and a plot."""

import json
from typing import Any

from saccade.cli.shared import add_json, emit, emit_table

EXAMPLE = "saccade bench --operators window,neighborhood --sides 7,14,28 --plot bench.svg"


def arguments(parser: Any) -> None:
    parser.add_argument("--operators", type=str | None, default=None, help="names with commas between; all by default")
    parser.add_argument("--sides", type=str, default="14,28,56,112", help="tokens along each axis of the square maps")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--head-dim", type=int, default=32, help="channels of a head")
    parser.add_argument("--backward", action="store_true", help="time forward and backward together")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", type=str, default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--plot", type=str | None, default=None, help="draw time against side: FILE.svg, .png or .pdf")
    add_json(parser)


def run(args: Any) -> int:
    from dataclasses import asdict

    import torch

    from saccade.errors import InputError, check_choice
    from saccade.measure import OPERATORS, bench_operators

    check_choice("dtype", args.dtype, ("float32", "bfloat16", "float16"))
    try:
        sides = [int(side) for side in args.sides.split(",")]
    except ValueError:
        raise InputError(f"sides is {args.sides!r}: give whole numbers such as 14,28,56") from None
    if args.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"device is {args.device!r}: torch finds no such device here. Take cpu")
    found = bench_operators(
        list(OPERATORS) if args.operators is None else [name.strip() for name in args.operators.split(",")],
        sides,
        batch=args.batch,
        heads=args.heads,
        head_dim=args.head_dim,
        backward=args.backward,
        device=args.device,
        dtype=getattr(torch, args.dtype),
    )
    if args.plot:
        _plot(found, args.plot)
    if args.json:
        emit(json.dumps([{**asdict(row), "speedups": row.speedups} for row in found], indent=1))
    else:
        _print_table(found, sides)
    return 0


def _print_table(found: list[Any], sides: list[int]) -> None:
    def cells(row: Any) -> list[str]:
        speedups = ["" if ratio is None else f" ({ratio:.1f}x)" for ratio in row.speedups]
        growth = "" if row.exponent is None else f"side^{row.exponent.value:.1f} ± {row.exponent.error:.1f}"
        return [row.operator, *(f"{own:.2f}{ratio}" for own, ratio in zip(row.milliseconds, speedups)), growth]

    columns = ("operator", *(f"{side}x{side}" for side in sides), "growth")
    emit_table("ms a call (speed-up over dense SDPA)", columns, map(cells, found))


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
