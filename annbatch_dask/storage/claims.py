"""Claims of running builds in a collection's folder: their dataset numbers and scratch folders.

A claim is a small file, ``.claim-<first number>``. On an object store, where there are no locks, it keeps two builds
from writing datasets of the same names. Everywhere it says which leftovers are those of a build, and where its scratch
folder is, until the build is over and its leftovers are gone: later builds need no other record.
"""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from annbatch_dask.errors import CollectionBusyError
from annbatch_dask.storage.conditions import check_conditions
from annbatch_dask.storage.folder import Folder

__all__ = ["CLAIM_NAME", "Claim", "Work", "claim_numbers", "end_claim", "find_claims", "release_claim"]

CLAIM_NAME = re.compile(r"\.claim-(\d+)")
_running: set[str] = set()
"""Nonces of the claims of builds that run in this process."""


@dataclass(frozen=True)
class Work:
    """Leftovers of a build.

    Attributes
    ----------
    plan
        Fingerprint of its plan, which its datasets hold.
    scratch
        URL of its own scratch folder.
    is_new
        Whether it made the folder that this one is in.
    """

    plan: str
    scratch: str
    is_new: bool = False


@dataclass(frozen=True)
class Claim:
    """A build's claim of ``n`` dataset numbers from ``first`` on.

    Attributes
    ----------
    key
        Identity of its work: an interrupted build finds its claim again by it.
    nonce
        Tells two runs of one build apart.
    owner
        The process, so that others on its machine see whether it still runs.
    has_ended
        Whether it has said itself that it runs no more.
    works
        The build's, and before it those of others that began with this number and were interrupted.
    """

    first: int
    n: int
    key: str = ""
    nonce: str = ""
    owner: Mapping[str, Any] = field(default_factory=dict)
    has_ended: bool = False
    works: tuple[Work, ...] = ()

    @property
    def name(self) -> str:
        """Name of its file."""
        return f".claim-{self.first}"

    @property
    def numbers(self) -> range:
        """Numbers of its datasets."""
        return range(self.first, self.first + self.n)

    def payload(self) -> bytes:
        """The file's content."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, first: int, payload: bytes) -> Claim | None:
        """Parse a file's content; None if it is no claim. Earlier releases wrote only ``key`` and ``n``."""
        try:
            values = json.loads(payload) | {"first": first}
            return cls(**values | {"works": tuple(Work(**w) for w in values.get("works", ()))})
        except (TypeError, ValueError):
            return None

    @property
    def is_here(self) -> bool:
        """True if its build's process is, or was, one of this machine, which can be asked."""
        me = _process(os.getpid())
        return bool(me["boot"]) and all(self.owner.get(k) == me[k] for k in ("host", "boot", "namespace"))

    @property
    def is_over(self) -> bool:
        """True if its build is known to run no more. That of another machine may run."""
        me = _process(os.getpid())
        if self.has_ended:
            return True
        if not self.is_here:
            return False
        if self.owner == me:
            return self.nonce not in _running
        return bool(self.owner != _process(int(self.owner["pid"])))


def _process(pid: int) -> dict[str, Any]:
    """Identity of a process, unique over time and machines."""
    boot, started, namespace = "", "", ""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            boot = f.read().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
        started = "" if fields[0] in "ZX" else fields[19]
    except OSError:  # no such process, or no such system
        pass
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace, "pid": pid, "started": started}


def find_claims(folder: Folder, names: Iterable[str] | None = None) -> list[Claim]:
    """The claims in a collection's folder, whose names may be given."""
    found = []
    for name in folder.names() if names is None else names:
        if (match := CLAIM_NAME.fullmatch(name)) and (payload := folder.find(name)) is not None:
            found.append(Claim.parse(int(match[1]), payload))
    return sorted(filter(None, found), key=lambda c: c.first)


def claim_numbers(folder: Folder, key: str, first: int, n: int, work: Work) -> Claim:
    """Claim ``n`` dataset numbers, ``first`` or above, that no other build writes.

    A local folder's lock keeps other builds away, and all claims there are of builds that are over. On an object store
    a build takes over the claim of an interrupted run of itself if that is known to be over, and leaves others alone.
    """
    mine = Claim(first, n, key, uuid.uuid4().hex, _process(os.getpid()), works=(work,))
    _running.add(mine.nonce)
    if folder.is_local:
        same = [c for c in find_claims(folder) if c.first == first]
        mine = _after(same, mine)
        folder.write(mine.name, mine.payload())
        return mine
    while True:
        claims, version = find_claims(folder), None
        again = [c for c in claims if (c.key, c.n) == (key, n) and c.first >= first and c.is_over][:1]
        if again:
            version = folder.version(again[0].name)
            if version is None or not _is_there(folder, again[0]):  # another one was first
                continue
            new = _after(again, mine)
        else:
            new = replace(mine, first=max([first, *(c.numbers.stop for c in claims)]))
        try:
            folder.replace(new.name, new.payload(), version=version)
        except CollectionBusyError:  # another one was first
            continue
        others = [c for c in find_claims(folder) if c.nonce != new.nonce]
        if not any(set(c.numbers) & set(new.numbers) for c in others):
            check_conditions(folder.fs, f"{folder.path}/{new.name}", new.payload())
            return new
        folder.remove_files([new.name])  # it may have looked before this one was there


def _after(claims: list[Claim], mine: Claim) -> Claim:
    """A claim in the place of others, whose scratch folders it remembers."""
    works: dict[str, Work] = {}
    for w in (w for c in (*claims, mine) for w in c.works):
        was_new = w.scratch in works and works[w.scratch].is_new
        works[w.scratch] = replace(w, is_new=w.is_new or was_new)
    return replace(mine, first=claims[0].first if claims else mine.first, works=tuple(works.values()))


def _is_there(folder: Folder, claim: Claim) -> bool:
    payload = folder.find(claim.name)
    found = None if payload is None else Claim.parse(claim.first, payload)
    return found is not None and found.nonce == claim.nonce


def end_claim(folder: Folder, claim: Claim) -> None:
    """Say that the build runs no more, and may be taken up again."""
    _running.discard(claim.nonce)
    if not folder.is_local and _is_there(folder, claim):
        folder.write(claim.name, replace(claim, has_ended=True).payload())


def release_claim(folder: Folder, claim: Claim) -> None:
    """Give up a claim whose build has left nothing."""
    _running.discard(claim.nonce)
    if _is_there(folder, claim):
        folder.remove_files([claim.name])
