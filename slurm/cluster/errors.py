"""The one error of the sandbox: what happened, where, and what to do next."""

from __future__ import annotations


class SandboxError(Exception):
    """A failure that a person can act on.

    Args:
        what: What went wrong, one line.
        where: The file, host or command it went wrong in.
        hint: What to do next.
    """

    def __init__(self, what: str, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)
