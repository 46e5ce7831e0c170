"""The one error type for mistakes of the user's."""


class UserError(ValueError):
    """A mistake in what the user wrote: one line that names the field, what was expected and what was received.

    The command line prints it as ``error: ...`` and exits with status 2, without a traceback.
    """
