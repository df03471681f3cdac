"""Attributes and methods of DeepSpeed's objects, replaced for a while.

[Note: overrides]
DeepSpeed is not forked: where it has to do something else, a method is replaced on one instance. Others do the same: users and
frameworks wrap `engine.save_checkpoint`, torch's schedulers wrap `optimizer.step`. So what an instance had before comes back, a method
that extends another calls what was there before, and a wrapper that somebody has put on top since is left in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

Method = Callable[..., Any]

_NOTHING = object()
"""In place of a value: the instance had none, and its class's was seen."""


@dataclass
class _Override:
    owner: Any
    name: str
    before: Any
    """What `vars(owner)` had, or `_NOTHING`."""
    ours: Any = _NOTHING

    def put(self, value: Any) -> None:
        self.ours = value
        setattr(self.owner, self.name, value)

    def take_back(self) -> None:
        if vars(self.owner).get(self.name, _NOTHING) is not self.ours:
            return
        if self.before is _NOTHING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


class Overrides:
    """Attributes and methods that are replaced until `remove`, or for the length of a `with`. See [Note: overrides].

    The owners are instances, or classes. `remove` restores what `vars(owner)` had. If the attribute is no longer ours then, because
    somebody has wrapped or replaced it since, it stays as it is; the wrapper still calls our method, which from then on only passes
    calls on to what was there before.
    """

    def __init__(self) -> None:
        self._overrides: list[_Override] = []
        self._live: list[list[Method]] = []
        """One list for each method, with the method in it until `remove`."""

    def attribute(self, owner: Any, name: str, value: Any) -> None:
        """`owner.name` is `value`."""
        override = _Override(owner, name, vars(owner).get(name, _NOTHING))
        override.put(value)
        self._overrides.append(override)

    def method(self, owner: Any, name: str, method: Method) -> None:
        """`owner.name(...)` calls `method(...)`, also where the owner has no such method."""
        if hasattr(owner, name):
            self._method(owner, name, method, method)
        else:
            self.attribute(owner, name, method)

    def around(self, owner: Any, name: str, method: Method) -> None:
        """`owner.name(...)` calls `method(original, ...)`; `original` is what `owner.name` was before."""
        original = getattr(owner, name)
        self._method(owner, name, functools.partial(method, original), original)

    def _method(self, owner: Any, name: str, method: Method, looks_like: Method) -> None:
        original = getattr(owner, name)
        live = [method]

        # With the signature of the method: transformers' Trainer looks at that of `save_checkpoint`.
        @functools.wraps(looks_like)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (live[0] if live else original)(*args, **kwargs)

        self._live.append(live)
        self.attribute(owner, name, call)

    def remove(self) -> None:
        """Take everything back, the last first. Calling it again changes nothing."""
        while self._overrides:
            self._overrides.pop().take_back()
        for live in self._live:
            live.clear()
        self._live.clear()

    def __enter__(self) -> Overrides:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()
