"""Chunks of a collection's arrays, straight from its shard files into given buffers."""
