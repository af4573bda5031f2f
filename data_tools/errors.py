"""The two ways a command ends early, and the exit code of each.

raise UserError("--min-tokens -1 is negative: write 0 or more")      # exit 2
raise Failure("corpus.zst is truncated after 4,096 bytes")           # exit 1
"""

from __future__ import annotations


class UserError(Exception):
    """What was asked cannot be done as asked: one sentence with value, rule and fix. Exit code
    2.
    """

    exit_code = 2


class Failure(Exception):
    """The request was fine, the world was not (broken archive, full disk). Exit code 1."""

    exit_code = 1
