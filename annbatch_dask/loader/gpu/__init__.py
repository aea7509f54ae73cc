"""Batches made on a GPU: a window goes there in one copy, as it is stored, and each batch is made of it there.

``window -> pinned slab -> [one copy] -> rows as stored -> [one kernel a batch] -> batch``

A device is torch's for batches of tensors, else cupy's. Tensors are made on a stream of the loader's own, on which the
host never waits: the consumer's stream waits for the batch, in the consumer's thread, as it takes it. Batches for
cupy and jax are finished before they are handed over, and belong to the default stream.

torch's device may be a CPU: the same code, without streams, in tests.
"""
