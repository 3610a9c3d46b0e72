"""Every exception that dsv4 raises on purpose.

Each message says what was found, what was expected and what to do about it. All derive from :class:`Dsv4Error`, so that
a caller (the command line, say) can print one line for them and let real defects through with their traceback. Each
also derives from the built-in that fits best, so that code that knows nothing of dsv4 can still catch it.
"""

from __future__ import annotations


class Dsv4Error(Exception):
    """Base class of all errors raised by dsv4."""


class ConfigError(Dsv4Error, ValueError):
    """A combination of settings that is not allowed, or a value outside its range."""


class InputError(Dsv4Error, ValueError):
    """A tensor argument with the wrong shape, dtype, device, layout or values."""


class StateError(Dsv4Error, RuntimeError):
    """A call in the wrong order: run before prepare, capture before warm-up, a setter after weights were fixed."""


class BackendError(Dsv4Error, RuntimeError):
    """No backend, or not the requested one, can run this configuration on this device."""


class CheckpointError(Dsv4Error, ValueError):
    """A checkpoint that cannot be read, or that holds values that must not be computed with."""
