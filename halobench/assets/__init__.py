"""Files shipped with the package: the embedded teacher, its text sample and the evaluation items built from it."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent
TINY_TEACHER = ASSETS / "tiny"
SHAPES = ASSETS / "shapes"
TEXT_TRAIN = ASSETS / "text" / "train.jsonl.gz"
TEXT_HELDOUT = ASSETS / "text" / "heldout.jsonl.gz"
TEXT_LONG = ASSETS / "text" / "heldout_long.jsonl.gz"
CONTINUATIONS = ASSETS / "eval" / "continuation.jsonl.gz"
