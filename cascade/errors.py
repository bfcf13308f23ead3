"""What can go wrong for a user, each with its exit code (README, "Errors").

CascadeError
├── ConfigError       2  a setting, a verb or a prompt
├── InputError        3  a file that is read: checkpoint, tokenizer, data, video
├── HostError         4  the machine: disk, ffmpeg, permission, device
├── NumericError      5  NaN or infinity
├── LockedError       6  another process works in the same directory
└── MemoryLimitError  7  out of memory
"""

from __future__ import annotations


class CascadeError(Exception):
    """One line for the user: what, which, why, and the `fix` (a command or a setting)."""

    code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message, self.fix = message, fix

    def __str__(self) -> str:
        line = f"{self.message.rstrip('.')}. Fix: {self.fix}" if self.fix else self.message
        return " ".join(line.split())


class ConfigError(CascadeError):
    code = 2


class InputError(CascadeError):
    code = 3


class HostError(CascadeError):
    code = 4


class NumericError(CascadeError):
    code = 5


class LockedError(CascadeError):
    code = 6


class MemoryLimitError(CascadeError):
    code = 7
