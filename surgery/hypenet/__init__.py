"""Released HypeNet checkpoints: reading them as hybrids of ours, and writing ours in their layout."""

from halobench.surgery.hypenet.reading import read_hypenet
from halobench.surgery.hypenet.weights import export_hypenet, import_hypenet
from halobench.surgery.hypenet.writing import write_hypenet

__all__ = ["export_hypenet", "import_hypenet", "read_hypenet", "write_hypenet"]
