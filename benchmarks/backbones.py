"""Networks beside timm's, with the same weights in one process, fp32 on the CPU.

    pip install 'saccade[timm]'
    python benchmarks/backbones.py                        # half an hour on two CPU cores
    python benchmarks/backbones.py --only davit_tiny --rounds 3 --pixels 224
    OMP_NUM_THREADS=1 python benchmarks/backbones.py --clock processor     # on a machine with other work to do

Outputs are compared before anything is timed. Each row says how many times faster than timm's ours is, forward and
forward + backward, and how much of timm's peak memory it takes. All calls of a row take turns, in eval mode; quote the
ratios. The table goes to benchmarks/results/backbones_cpu.csv, where rows of networks that were not run stay.
"""

import argparse
import csv
import gc
import importlib
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from peers import without_torchvision
from sparse import take_turns
from torch import Tensor, nn

import saccade
from saccade.backbones import Backbone, create_model
from saccade.backbones.weights import load_weights
from saccade.measure import measure_peak_memory

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
CSV = Path(__file__).parent / "results" / "backbones_cpu.csv"
MB = 2**20


class Peer(NamedTuple):
    """A network of timm.

    Attributes:
        name: timm's.
        sized: it is built for one size of the images, as ours is.
        images: pixels along each side, and images of a batch.
    """

    name: str
    sized: bool = False
    images: tuple[tuple[int, int], ...] = ((224, 4), (448, 1))


PEERS = {
    "convit_tiny": Peer("convit_tiny", sized=True),
    "davit_tiny": Peer("davit_tiny"),
    "focalnet_tiny_srf": Peer("focalnet_tiny_srf"),
    # timm's blocks of 8 must divide the maps of 1/16 and 1/32
    "halonet26t": Peer("halonet26t", images=((256, 4), (512, 1))),
    "maxvit_tiny": Peer("maxvit_tiny_tf_224", sized=True),
    "volo_d1": Peer("volo_d1_224", sized=True),
}


def import_timm() -> ModuleType:
    """timm, with a stand-in for torchvision where that cannot be imported."""
    without_torchvision()
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise SystemExit(f"timm cannot be imported: {error}. Install it: pip install 'saccade[timm]'") from error


def build_both(name: str, pixels: int) -> tuple[Backbone, nn.Module]:
    """Ours and timm's, with the same random weights, none of them near 0, where a path could hide."""
    peer = PEERS[name]
    torch.manual_seed(0)
    theirs = import_timm().create_model(peer.name, **({"img_size": pixels} if peer.sized else {}))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ours = create_model(name, **({"image_size": pixels} if peer.sized else {}))
    assert isinstance(ours, Backbone)
    load_weights(ours, theirs.state_dict(), f"timm's {peer.name}")
    return ours.eval(), theirs.eval()


def forward(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """The call without gradients."""
    return torch.no_grad()(lambda: model(images))


def training(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """Forward and backward of the call."""
    upstream = torch.randn(len(images), 1000)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(images).backward(upstream)

    return train


def describe_machine() -> str:
    """The processor's name, and how many cores this machine has."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def measure(name: str, pixels: int, batch: int, rounds: int, clock: str) -> dict[str, Any]:
    """One row."""
    ours, theirs = build_both(name, pixels)
    images = torch.randn(batch, 3, pixels, pixels)
    got, expected = forward(ours, images)(), forward(theirs, images)()
    difference = ((got - expected).norm() / expected.norm()).item()
    assert difference < 1e-4, f"outputs differ by {difference:.1e}"
    calls = {
        f"{who}{what}": make(model, images)
        for what, make in (("", forward), (", both", training))
        for who, model in (("ours", ours), ("timm", theirs))
    }
    took, memory = {}, {}
    for what in ("", ", both"):
        took |= take_turns({who: calls[who] for who in (f"ours{what}", f"timm{what}")}, rounds, CLOCKS[clock])
        for model in (ours, theirs):  # what gradients take is part of training, not of what was there before
            model.zero_grad(set_to_none=True)
        for who in ("ours", "timm"):
            gc.collect()
            memory[f"{who}{what}"] = measure_peak_memory(calls[f"{who}{what}"]).bytes / MB
            ours.zero_grad(set_to_none=True)
            theirs.zero_grad(set_to_none=True)
    return {
        "network": name,
        "peer": PEERS[name].name,
        "pixels": pixels,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": describe_machine(),
        "clock": clock,
        "difference": f"{difference:.1e}",
        **{f"{who} ms": f"{took[who]:.1f}" for who in calls},
        **{f"{who} MB": f"{memory[who]:.1f}" for who in calls},
        "speed-up": f"{took['timm'] / took['ours']:.3f}",
        "speed-up, both": f"{took['timm, both'] / took['ours, both']:.3f}",
        "memory": f"{memory['ours'] / memory['timm']:.3f}",
        "memory, both": f"{memory['ours, both'] / memory['timm, both']:.3f}",
    }


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Rows into the table, in place of those of the same network and images."""

    def key(row: dict[str, Any]) -> tuple[str, int]:
        return row["network"], int(row["pixels"])

    table: dict[tuple[str, int], dict[str, Any]] = {}
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            table = {key(row): row for row in csv.DictReader(file)}
    table |= {key(row): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(table[each] for each in sorted(table))


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PEERS), help="networks to run")
    parser.add_argument("--pixels", type=int, nargs="*", help="sizes of images to run")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each call")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="processor leaves the others' work out")
    parser.add_argument("--csv", type=Path, default=CSV, help="where the table goes")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, timm {import_timm().__version__}")
    print("times faster than timm, and share of its peak memory: forward / forward + backward")
    known = saccade.list_models()
    for name in args.only or PEERS:
        if name not in known:
            print(f"{name}: saccade has no such network")
            continue
        for pixels, batch in PEERS[name].images:
            if args.pixels and pixels not in args.pixels:
                continue
            row = measure(name, pixels, batch, args.rounds, args.clock)
            speed, memory = (f"{row[what]} / {row[f'{what}, both']}" for what in ("speed-up", "memory"))
            print(f"{name}, {batch} x {pixels} px: {speed}, memory {memory}", flush=True)
            write([row], args.csv)


if __name__ == "__main__":
    main()
