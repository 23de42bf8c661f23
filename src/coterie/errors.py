"""The one exception users meet."""


class CoterieError(ValueError):
    """Bad input: the message names the file or tensor, what was found, what was expected, and what to do."""
