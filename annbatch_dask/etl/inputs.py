"""A record of a collection's inputs, in its log folder: their locations and contents.

The collection itself holds nothing that differs between two builds of equal files, such as paths and times. The
document is written before the commit, under a name that the committed manifest alone has, so it is there when that is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b

from annbatch_dask.errors import AnnbatchDaskError
from annbatch_dask.etl.log import log_folder
from annbatch_dask.manifest import Manifest
from annbatch_dask.sources.identity import is_known
from annbatch_dask.storage.folder import Folder

__all__ = ["Input", "forget_inputs_of", "known_inputs", "record_inputs"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Input:
    """An input's place and content, as digests: a place may be a secret. Empty where they are not known."""

    where: str = ""
    content: str = ""

    @classmethod
    def of(cls, where: str, identity: str) -> Input:
        """Make an input from a place and an identity, see :mod:`annbatch_dask.sources.identity`."""
        return cls(_digest(where), _digest(identity if is_known(identity) else ""))


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest() if text else ""


def record_inputs(target: Folder, manifest: Manifest, inputs: Sequence[Input]) -> None:
    """Write down the inputs of a manifest that is about to be committed, one for each of its sources.

    Without the document the collection is whole, but a repeated call is not known to be one: a warning.
    """
    payload = json.dumps([asdict(i) for i in inputs]).encode()
    try:
        log_folder(target).write(_name(manifest), payload)
    except (OSError, AnnbatchDaskError) as e:
        logger.warning("%s: which files it was made of could not be written down: %s", target.url, e)


def known_inputs(target: Folder, manifest: Manifest) -> list[Input]:
    """The inputs of a collection, one for each of the manifest's sources; empty ones where nothing is known."""
    found = log_folder(target).find(_name(manifest))
    inputs = [] if found is None else [Input(**values) for values in json.loads(found)]
    return inputs if len(inputs) == len(manifest.sources) else [Input()] * len(manifest.sources)


def forget_inputs_of(target: Folder, manifest: Manifest) -> None:
    """Remove what was written down of a manifest that has been replaced."""
    log_folder(target).unlink(_name(manifest))


def _name(manifest: Manifest) -> str:
    return f"{manifest.identity}-{manifest.to_json()['crc32c']}.inputs.json"
