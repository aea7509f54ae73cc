"""The only code that touches bytes: sources, spill files, shards, and how things are published."""
