"""From raw text to batches: sources, curation, preparation, the loader and its n-gram baseline."""
