"""Every error that p48ray raises on purpose. One base, positional arguments only, so that each
crosses a Ray process boundary intact."""


class P48Error(Exception):
    """Base of all errors raised on purpose. The message names the file and key, what was expected,
    what was found and what to do next."""


class UserError(P48Error):
    """Something the user supplied is wrong: configuration, source checkpoint, texts, run root. The
    job exits with code 2."""


class ConfigError(UserError):
    """A configuration key is unknown or has a bad value, or a place can not be used for what it is
    named for. Names the key."""


class SourceError(UserError):
    """The source checkpoint is missing something, is corrupt, or has a layout that is not
    supported. Names file and tensor."""


class CalibrationError(UserError):
    """Calibration or evaluation texts are unusable, or the statistics gathered from them are not
    finite."""


class RowSkippedError(P48Error):
    """A record of texts is of no use; texts.tally counts it. Arguments: the reason in a few words,
    then key, what was expected and what was found."""

    def __str__(self) -> str:
        """The detail alone."""
        return str(self.args[-1])

    @property
    def reason(self) -> str:
        """By which it is counted."""
        return str(self.args[0])


class PlanMismatchError(UserError):
    """The run root holds the plan of another run. Names the first setting that differs and both
    values."""


class ObjectMissingError(P48Error):
    """A key is not in the store."""


class ShardCorruptError(P48Error):
    """Stored bytes differ from what their manifest or header claims."""


class CorruptObjectError(ShardCorruptError):
    """Something in the run root is not what its manifest says, and can be made anew. Arguments: the
    message, then the keys to delete for that."""

    def __str__(self) -> str:
        """The message alone."""
        return str(self.args[0]) if self.args else ""

    @property
    def keys(self) -> tuple[str, ...]:
        """What to delete so that the run makes it again."""
        return tuple(self.args[1:])


class TransientStoreError(P48Error):
    """A store operation failed in a way that a retry may cure. Runners try again.

    Arguments: the message; then, where the service said so, the seconds after which it wants to be
    asked again.
    """

    def __str__(self) -> str:
        """The message alone."""
        return str(self.args[0]) if self.args else ""

    @property
    def retry_after_s(self) -> float | None:
        """Seconds, as the service's Retry-After said; None where it said nothing."""
        return self.args[1] if len(self.args) > 1 else None


class GaveUpError(TransientStoreError):
    """Tried as often as its policy says (store.retry). A runner may try the whole task again; no
    other policy does."""


class WorkerLostError(P48Error):
    """The process that worked on a task died: out of memory, killed, or its node with it."""


class NumericsError(P48Error):
    """A solver's precondition does not hold: shape, finiteness, positive definiteness beyond the
    damping ladder."""


class StageFailedError(P48Error):
    """A stage ended with tasks that have no manifest. Lists them; their tracebacks lie under
    failures/ in the run root."""


class BudgetSpentError(P48Error):
    """run.max_gpu_hours is reached. Says the sum; what is finished stays."""


class VerificationError(P48Error):
    """The finished checkpoint does not hold what its plan and manifests promise. Lists what was
    found."""


class RequirementError(P48Error):
    """A figure that publishing was made to depend on is missing, or is not what was required. Lists
    each with what was found; nothing was sent."""
