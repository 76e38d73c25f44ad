"""Ranks that no longer answer end the job with their name, instead of letting the others wait in a collective.

A killed rank resets its connections, so its peers fail at once, but with an address and no name. A rank that is
stopped, swapped out, or on a host that is gone resets nothing. So each rank counts in the store at which the ranks met,
from a thread of its own, whatever its step is doing, and looks at what the others count.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from fastmllm.train.inventory import Group, alive, is_sibling

AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # set where the store is torchrun's, not rank 0's
LEFT, FAILED = "left", "failed: "
# what a torch without one type for it says when a peer is gone or does not come
LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "NCCL", "gloo")


class RankLostError(RuntimeError):
    """A rank does not answer any more."""


class Ranks(Group, Protocol):
    """Name what is needed of `engine.Engine`."""

    def store(self) -> Any: ...


class Watchdog:
    """Watch the other ranks while its body runs; with one rank, or a limit of 0, nothing is watched.

    A rank that left the body for an error counts as one that does not answer, with the error. A process that was itself
    paused (a suspended job, a debugger) starts to count anew.

    Args:
        ranks: who is watched.
        limit_s: seconds without a count after which a rank is lost.
        what: begins the messages, such as the stage's name.
        kept: tells which checkpoint there is, for the messages.
        end: ends this process, whose step may be waiting where no exception reaches it.
    """

    def __init__(
        self,
        ranks: Ranks,
        limit_s: float,
        *,
        what: str,
        kept: Callable[[], Path | None],
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.ranks, self.limit_s, self.what, self.kept, self._end = ranks, limit_s, what, kept, end
        self.period_s = limit_s / 8
        self._stop = threading.Event()
        self._others = [rank for rank in range(ranks.world_size) if rank != ranks.rank] if limit_s else []
        self._who: list[tuple[str, int, str]] = []  # host, process and machine of each rank
        self._seen: dict[int, tuple[str, float]] = {}  # what a rank counted last, and when that was seen
        self._answered = 0.0  # when the store answered last

    def __enter__(self) -> Watchdog:
        if self._others:
            name = self.ranks.gather(uuid.uuid4().hex)[0]
            self._store, self._name = self.ranks.store(), f"watchdog/{name}"
            self._store.set_timeout(timedelta(seconds=self.limit_s))
            self._count("0")
            self._who = self.ranks.gather((socket.gethostname(), os.getpid(), _machine()))  # all have counted then
            self._forgive()
            for loop in (self._beat, self._watch):
                threading.Thread(target=loop, name=f"watchdog{loop.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._others:
            return
        lost: dict[int, str] = {}
        if isinstance(error, RuntimeError) and _is_about_a_peer(error):
            lost = self._wait_for_lost()
        self._stop.set()
        # In a thread, as a store in a stopped process answers nobody.
        last = LEFT if error is None else f"{FAILED}{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        leaving = threading.Thread(target=self._try_count, args=(last,), daemon=True)
        leaving.start()
        leaving.join(timeout=self.period_s)
        if lost:
            message = self._message(lost)
            self._end_silent(lost)
            raise RankLostError(message) from error

    # --- threads ------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        number = 0
        while not self._stop.wait(self.period_s):
            number += 1
            try:
                self._count(str(number))
                values = self._store.multi_get([self._key(rank) for rank in self._others])
            except RuntimeError:  # it is gone: `_watch` notices
                return
            now = self._answered = time.monotonic()
            for rank, value in zip(self._others, values, strict=True):
                text = value.decode(errors="replace")
                if text == LEFT or text != self._seen[rank][0]:
                    self._seen[rank] = (text, now)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self.period_s):
            now = time.monotonic()
            if now - before > 3 * self.period_s:
                self._forgive()
            elif now - self._answered > self.limit_s:
                self._give_up({})
            elif (lost := self._lost(now)) and now - self._answered < 3 * self.period_s:  # else nobody could be seen
                self._give_up(lost)
            before = now

    def _forgive(self) -> None:
        now = self._answered = time.monotonic()
        self._seen = {rank: (self._seen.get(rank, ("", 0.0))[0], now) for rank in self._others}

    def _give_up(self, lost: Mapping[int, str]) -> None:
        print(self._message(lost), file=sys.stderr, flush=True)
        sys.stdout.flush()
        self._end_silent(lost)
        self._stop.set()
        self._end(1)
        return None

    def _end_silent(self, lost: Mapping[int, str]) -> None:
        """Kill lost ranks that the same launcher started here.

        What is stopped hears no SIGTERM, and torchrun waits half a minute before it kills; in torch 2.13 its
        --shutdown-timeout does not change that.
        """
        for rank, text in lost.items():
            _, pid, machine = self._who[rank]
            if not text.startswith(FAILED) and machine == _machine() and is_sibling(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    # --- who is lost --------------------------------------------------------------------------------------------

    def _lost(self, now: float) -> dict[int, str]:
        """Return how each rank that is lost was last seen."""
        return {rank: text for rank, (text, seen) in list(self._seen.items()) if now - seen > self.limit_s}

    def _wait_for_lost(self) -> dict[int, str]:
        """Return the lost ranks; a process of this host that has ended is one at once, others once they are silent."""
        deadline = time.monotonic() + self.limit_s + 2 * self.period_s
        while (now := time.monotonic()) < deadline:
            lost = self._lost(now)
            for rank, (text, _) in list(self._seen.items()):
                if text.startswith(FAILED) or self._has_died(rank):
                    lost[rank] = text
            if lost:
                return lost
            time.sleep(min(0.05, self.period_s))
        return {}

    def _message(self, lost: Mapping[int, str]) -> str:
        told = "; ".join(self._describe(rank, text) for rank, text in sorted(lost.items()))
        if not lost:
            owner = "torchrun" if AGENT in os.environ else "rank 0 ({}, process {})".format(*self._who[0])
            told = f"the store of {owner}, where the ranks met, has not answered for {self.limit_s:g} s"
        kept = self.kept()
        then = (
            f"checkpoint {kept} is kept: run the same again to go on from there" if kept else "there is no checkpoint"
        )
        return f"{self.what}: {told}; rank {self.ranks.rank} ends; {then}"

    def _describe(self, rank: int, text: str) -> str:
        host, pid, _ = self._who[rank]
        if text.startswith(FAILED):
            return f"rank {rank} ({host}, process {pid}) {text}"
        if self._has_died(rank):
            return f"rank {rank} ({host}, process {pid}) has died"
        return f"rank {rank} ({host}, process {pid}) has not answered for {self.limit_s:g} s: stuck, stopped or gone"

    def _has_died(self, rank: int) -> bool:
        _, pid, machine = self._who[rank]
        return machine == _machine() and not alive(pid)

    # --- the store ----------------------------------------------------------------------------------------------

    def _key(self, rank: int) -> str:
        return f"{self._name}/{rank}"

    def _count(self, value: str) -> None:
        self._store.set(self._key(self.ranks.rank), value)

    def _try_count(self, value: str) -> None:
        try:
            self._count(value)
        except RuntimeError:
            return


def _machine() -> str:
    """Return what two processes share if they see each other by number: containers and clones share a host's name."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return (
        f"{boot.read_text().strip()} {os.readlink(space)}" if boot.exists() and space.exists() else socket.gethostname()
    )


def _is_about_a_peer(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or any(text in str(error) for text in LOST)
