"""Official state dicts as names and shapes: read by tests/backbones, and written by this file run as a program.

    python tests/recorded/networks.py KEY NAME=FIXTURE NAME:option=value=FIXTURE ...

packs ../shared/fixtures/KEY/FIXTURE.keys.json into tests/recorded/KEY/networks.json.xz. NAME is one of
`saccade.list_models()`; options are arguments with which the network has those shapes. Without NAMEs it lists the
fixtures.
"""

import ast
import json
import lzma
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
FIXTURES = Path(os.environ.get("SACCADE_FIXTURES", HERE.parents[2] / "shared" / "fixtures"))
FILE = "networks.json.xz"


def recorded_networks():
    """(what to show in a test's name, the record) for all papers; a record has model, options, params and state."""
    found = []
    for path in sorted(HERE.glob(f"*/{FILE}")):
        for record in json.loads(lzma.decompress(path.read_bytes())):
            options = "".join(f"-{name}={value}" for name, value in record["options"].items())
            found.append((f"{record['model']}{options}", record))
    return found


def pack(key, rows):
    """Write records of (model, options, fixture), sorted so that the same rows give the same bytes."""
    records = []
    for model, options, fixture in rows:
        official = json.loads((FIXTURES / key / f"{fixture}.keys.json").read_text())
        state = official["keys"] if "keys" in official else official["state"]
        records.append({"model": model, "options": options, "params": official["params"], "state": state})
    text = json.dumps(sorted(records, key=lambda record: (record["model"], str(record["options"]))))
    (HERE / key).mkdir(exist_ok=True)
    (HERE / key / FILE).write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def _read_row(argument):
    name, fixture = argument.rsplit("=", 1)
    model, *options = name.split(":")
    pairs = (option.split("=", 1) for option in options)
    return model, {name: ast.literal_eval(value) for name, value in pairs}, fixture


if __name__ == "__main__":
    paper, *names = sys.argv[1:]
    if names:
        pack(paper, map(_read_row, names))
    else:
        files = sorted((FIXTURES / paper).glob("*.keys.json"))
        print(*(re.sub(r"\.keys$", "", file.stem) for file in files), sep="\n")
