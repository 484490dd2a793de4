"""Who is at something in a store, so that two do not do it at once.

Every holder has an object of its own and renews it; nobody overwrites another's, so stores without
conditional writes will do. How old one is the store's clock says. A holder that was killed is known
at once on its own machine, and elsewhere when it has not renewed for long.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
from pydantic import NonNegativeInt, ValidationError

from storage.errors import EspalierError, MissingKey
from storage.section import Section
from storage.store import Store

_log = logging.getLogger(__name__)

RENEW = 10.0
"""Seconds between two renewals."""
STALE = 60.0
"""Seconds without one after which a holder counts as lost."""
_LOOK = 1.0


class LeaseError(EspalierError):
    """Somebody else is at it."""


class Holder(Section):
    """A process that is at something."""

    host: str
    namespace: str
    """Of process numbers: containers on one machine have their own."""
    process: NonNegativeInt
    began: float
    """When the process did, by its machine's clock: numbers are used again."""
    renewals: NonNegativeInt = 0
    """What tells a living one from afar: ages are in whole seconds."""

    @property
    def here(self) -> bool:
        """Whether this process could see it."""
        mine = this_process()
        return (self.host, self.namespace) == (mine.host, mine.namespace)

    @property
    def dead(self) -> bool:
        """Whether it is known here that it has ended."""
        if not self.here:
            return False
        try:
            process = psutil.Process(self.process)
            gone = process.status() == psutil.STATUS_ZOMBIE
            return gone or abs(process.create_time() - self.began) > 1
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:  # somebody else's, of which nothing may be known
            return False


def this_process() -> Holder:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    me = psutil.Process()
    return Holder(
        host=socket.gethostname(), namespace=namespace, process=me.pid, began=me.create_time()
    )


@contextmanager
def holding(store: Store, prefix: str, what: str) -> Iterator[None]:
    """Hold what the leases under `prefix` are for; `what` names it.

    Of a holder on another machine it is waited for until it renews or is stale. LeaseError when
    there is another; and in the block, as soon as another has taken this one for lost.
    """
    key = f"{prefix}/{uuid.uuid4().hex}.json"
    me = this_process()
    ended, lost = threading.Event(), threading.Event()

    def write(renewals: int) -> None:
        holder = me.model_copy(update={"renewals": renewals})
        store.write(key, holder.model_dump_json().encode())

    def renew() -> None:
        for renewals in itertools.count(1):
            if ended.wait(RENEW):
                return
            # A store that does not answer for a while is for others to stop at.
            with suppress(EspalierError):
                if all(each != key for each in store.keys(prefix)):
                    lost.set()
                    # As Ctrl-C does; a real signal, since it also ends what waits.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return
                write(renewals)

    write(0)
    renewing = threading.Thread(target=renew, daemon=True)
    renewing.start()  # before it waits: of two that begin at once neither takes the other for lost
    try:
        _wait_for_others(store, prefix, key, what)
        yield
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
        raise LeaseError(
            f"{what}: this process did not reach {store.url} for {STALE:.0f} s, and another has "
            "gone on with it; nothing finished is lost"
        ) from None
    finally:
        ended.set()
        renewing.join()
        with suppress(EspalierError):
            store.remove(key)


def _wait_for_others(store: Store, prefix: str, mine: str, what: str) -> None:
    seen: dict[str, Holder] = {}
    while others := [each for each in store.listing(prefix) if each.key != mine]:
        for key, _, age in others:
            holder = _read(store, key)
            if holder is None or holder.dead or age > STALE:
                store.remove(key)
                continue
            if holder.here or holder != seen.get(key, holder):
                raise LeaseError(
                    f"{what}: process {holder.process} on {holder.host} is running it; wait until "
                    "that has ended, or stop it"
                )
            if key not in seen:
                _log.warning(
                    "%s: process %d on %s was running it %.0f s ago; waiting to see whether it "
                    "still is", what, holder.process, holder.host, age,
                )  # fmt: skip
            seen[key] = holder
        if any(key in seen for key, _, _ in others):
            time.sleep(_LOOK)


def _read(store: Store, key: str) -> Holder | None:
    try:
        with store.read(key) as body:
            return Holder.model_validate_json(body.read())
    except (MissingKey, ValidationError):
        return None
