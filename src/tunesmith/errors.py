"""Every exception that tunesmith raises on purpose, each with the exit code the command line returns for it.

    TunesmithError
    ├── UserError (2)             the user's input is at fault
    │   ├── ConfigError           a setting: unknown key, wrong type, value out of range, options that contradict
    │   ├── DataError             a data file or a row of it
    │   ├── ModelError            a model, tokenizer or adapter that cannot be used as asked
    │   └── RunError              a run folder: missing, already there, damaged
    ├── MachineError (3)          the machine cannot: missing package, no memory, no disk
    ├── VerificationError (1)     something was made, checked, and found wrong (merge, training that did not train, a gate)
    └── Interrupted (130)         stopped by a signal, state saved

A message says what was found, where, what is allowed and what to change. The command line prints it without a traceback.
"""

from __future__ import annotations

SHOWN_PROBLEMS = 20
"""How many problems of a data file a message lists."""


class TunesmithError(Exception):
    """Base of all errors that tunesmith raises on purpose."""

    exit_code = 1


class UserError(TunesmithError):
    """The user's input is at fault."""

    exit_code = 2


class ConfigError(UserError):
    """One or more settings are wrong. `problems` holds one line for each."""

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """A data file, or rows of it, cannot be trained on. `problems` holds one line for each; the message shows the first 20."""

    def __init__(self, problems: list[str] | str):
        self.problems = [problems] if isinstance(problems, str) else problems
        hidden = len(self.problems) - SHOWN_PROBLEMS
        more = [f"and {hidden} more rows with problems"] if hidden > 0 else []
        super().__init__("\n".join(self.problems[:SHOWN_PROBLEMS] + more))


class ModelError(UserError):
    """A model, tokenizer or adapter cannot be used as asked."""


class RunError(UserError):
    """A run folder is missing, exists already, or is damaged."""


class MachineError(TunesmithError):
    """The machine cannot do it: a missing package, not enough memory, a full disk."""

    exit_code = 3


class VerificationError(TunesmithError):
    """A result was checked and is wrong."""

    exit_code = 1


class Interrupted(TunesmithError):
    """Stopped by SIGINT or SIGTERM after the state was saved."""

    exit_code = 130


def shown(value: object) -> str:
    """A value in a message, as Python writes it, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
