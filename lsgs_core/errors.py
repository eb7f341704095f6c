"""The one exception for input that a user can put right."""


class InputError(ValueError):
    """Bad input: a file, field or parameter that is not what it has to be.

    The message names the file or field, says what was found and what was expected, and is raised
    before any long work starts.
    """


class MissingFileError(InputError):
    """A file that has to be there is not."""
