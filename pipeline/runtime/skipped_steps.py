"""Steps that were skipped since their gradient was not finite: a few are counted, a row ends."""

from __future__ import annotations

from pipeline.errors import Diverged

SKIP_LIMIT = 10  # in a row, where no recipe says otherwise


class SkippedSteps:
    """Counts the skipped steps in `total`; `limit` of them in a row end the run.

    limit_name, remedy: what the limit is called and what to change, for the sentence.
    """

    def __init__(
        self,
        limit: int,
        limit_name: str = "optimizer.skip_limit",
        remedy: str = "resume from the last checkpoint with a lower optimizer.base_lr or with "
        "optimizer.gradient_clipping",
    ) -> None:
        self.limit, self.limit_name, self.remedy, self.total = limit, limit_name, remedy, 0
        self._row: list[int] = []

    def note(self, step: int, skipped: bool) -> None:
        """Note step `step` (0-based). Diverged after `limit` skipped steps in a row."""
        if not skipped:
            self._row = []
            return
        self.total += 1
        self._row.append(step + 1)
        if len(self._row) >= self.limit:
            raise Diverged(
                f"the gradient was not finite in steps {self._row[0]} to {step + 1} in a row "
                f"({self.limit_name} {self.limit}); the weights are those after step "
                f"{self._row[0] - 1}: {self.remedy}"
            )

    def at_end(self) -> str:
        """A sentence for a run whose last steps were skipped: it may have diverged. Else ""."""
        if not self._row:
            return ""
        one = len(self._row) == 1
        which = "the last step was" if one else f"the last {len(self._row)} steps were"
        return (
            f"{which} skipped, since the gradient was not finite: the weights are those after step "
            f"{self._row[0] - 1}; {self.remedy}"
        )
