"""The library's exceptions. The native core raises these very classes."""


class SidpError(Exception):
    """Anything this library raises on purpose."""


class ConfigError(SidpError):
    """A bad argument; the message names the value, what was expected and the mend."""


class LayoutError(SidpError):
    """A tensor, arena or record whose shape, dtype, device or size is not what was agreed."""


class PeerError(SidpError):
    """A rank of the group died or does not answer within the timeout."""

    def __init__(self, message: str, rank: int = -1):
        super().__init__(message)
        self.rank = rank

    def __reduce__(self):
        return type(self), (self.args[0], self.rank)


class PoolClosedError(SidpError):
    """The pool was closed; its weights are gone."""
