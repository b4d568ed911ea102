"""What two runs of the same study share: everything but timings, and what follows from them."""

from typing import Any

TIMED = {"created", "command", "seconds", "train_seconds", "latency_ms", "throughput", "milliseconds", "time_exponent"}
ON_TIMINGS = {"suggested", "sentence", "reasons", "trust"}  # of a recommendation: the cheapest of equals


def without_timings(record: Any) -> Any:
    """The record without the keys above, at any depth."""
    if isinstance(record, dict):
        return {key: without_timings(value) for key, value in record.items() if key not in TIMED | ON_TIMINGS}
    return [without_timings(each) for each in record] if isinstance(record, list) else record
