"""Pure array work on given buffers: no files, no engines, nothing of ours but errors."""
