"""Every error that jaxserve raises on purpose, and the tree they hang from.

    JaxserveError
    ├── InvalidRequestError (ValueError)     a request that can never be served: names the field, the value, the remedy
    ├── ConfigError (ValueError)             an engine that cannot be built as asked
    │   └── UnknownModelError                no family is registered for this config.json
    ├── CheckpointError (ValueError)         files that are missing, damaged, or not what they claim
    │   └── ModelNotFoundError               neither a directory nor a Hub id that can be resolved here
    ├── ConstraintError                      a running request cannot go on within the form that it asked for
    ├── OverloadedError                      no room now: try again after `retry_after_s`
    ├── DrainingError                        the engine takes no new requests; it is shutting down
    ├── EngineDeadError                      the engine thread ended with an error; its cause is chained
    └── IntegrityError                       the engine's own books do not balance: a bug, never the user's doing

The front doors map each branch to one wire status (`serve.errors`), so a new error needs a place in this tree first.
"""

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
"""Shows what was given without copying a prompt of 100 MB."""
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class JaxserveError(Exception):
    """The root: catching it catches everything that jaxserve raises on purpose."""


class InvalidRequestError(JaxserveError, ValueError):
    """A request that can never be served.

    Attributes:
        parameter: the field's name, as the caller spells it.
        value: what was given.
    """

    def __init__(self, parameter: str, value: Any, allowed: str, remedy: str = ""):
        self.parameter = parameter
        self.value = value
        shown = _SHORT.repr(value)
        super().__init__(f"{parameter} must be {allowed}, got {shown}." + (f" {remedy}" if remedy else ""))


class ConfigError(JaxserveError, ValueError):
    """An engine that cannot be built as asked; the message names the field and the values that would work."""


class UnknownModelError(ConfigError):
    """No family is registered for this configuration; the message lists those that are."""


class CheckpointError(JaxserveError, ValueError):
    """Files that are missing, damaged, or not what they claim to be; the message names file and tensor."""


class ModelNotFoundError(CheckpointError):
    """A model name that is neither a directory nor a Hub id that can be resolved from here."""


class ConstraintError(JaxserveError):
    """A running request cannot go on within the form that it asked for (`structured_outputs`, `bad_words`).

    Attributes:
        parameter: the field that asked for it.
    """

    def __init__(self, message: str, parameter: str = "structured_outputs"):
        self.parameter = parameter
        super().__init__(f"{parameter}: {message}")


class OverloadedError(JaxserveError):
    """No room at the moment.

    Attributes:
        retry_after_s: when it is worth trying again [s].
    """

    def __init__(self, message: str, retry_after_s: float = 1.0):
        self.retry_after_s = retry_after_s
        super().__init__(message)


class DrainingError(JaxserveError):
    """The engine takes no new requests, because it is shutting down."""


class EngineDeadError(JaxserveError):
    """The engine thread ended with an error; every waiting request gets this, with the cause chained."""


class IntegrityError(JaxserveError):
    """The engine's own books do not balance. A bug in jaxserve, never the user's doing."""
