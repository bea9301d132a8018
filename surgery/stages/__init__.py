"""The stages of a conversion: what trains in each, and its loss."""
