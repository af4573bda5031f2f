"""The user's mistakes: one sentence saying what was given, the rule it breaks, what to write
instead. Entry points print it and exit with 2; anything else is a failure and exits 1.
"""


class UserError(Exception):
    """A mistake that the user can mend; its text is all that is shown."""


class ConfigError(UserError):
    """A mistake in a config file or in an override."""


class Verdict(Exception):
    """A run judged that going on is hopeless, and why, in one sentence: exit code 1, no traceback,
    and no launcher should start it again as it is."""
