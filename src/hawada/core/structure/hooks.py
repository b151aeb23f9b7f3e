"""The base class of the hooks that this package registers on a model's modules."""

from __future__ import annotations


class ModelHook:
    """A forward hook or forward pre-hook of this package; a slim model is copied without any of them.

    A hook is an object that holds what it needs rather than a closure over it: a deep copy of a model then copies its
    hooks together with what they hold.
    """
