"""What a model costs: parameters, FLOPs, bytes, peak memory, time, and how cost grows with image side."""

from saccade.measure.flops import FlopCount, count_flops
from saccade.measure.masks import PEERS, MaskTiming, PeerTiming, bench_masks
from saccade.measure.memory import PeakMemory, count_bytes, count_parameters, measure_peak_memory
from saccade.measure.operators import OPERATORS, OperatorTiming, bench_operators
from saccade.measure.scaling import Exponent, Scaling, fit_exponent, measure_scaling
from saccade.measure.timing import Timing, measure_time

__all__ = [
    "OPERATORS",
    "PEERS",
    "Exponent",
    "FlopCount",
    "MaskTiming",
    "OperatorTiming",
    "PeakMemory",
    "PeerTiming",
    "Scaling",
    "Timing",
    "bench_masks",
    "bench_operators",
    "count_bytes",
    "count_flops",
    "count_parameters",
    "fit_exponent",
    "measure_peak_memory",
    "measure_scaling",
    "measure_time",
]
