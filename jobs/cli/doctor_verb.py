"""The verb that looks at this machine: doctor."""

from __future__ import annotations

from jobs.cli.terminal import show
from otpo.errors import WorkError


def doctor() -> None:
    """What is installed and what is missing. Each with the line that mends it; devices too."""
    from jobs.doctor import examine

    findings = examine()
    for finding in findings:
        show(f"{'ok     ' if finding.ok else 'MISSING'}  {finding.what}: {finding.found}")
        if not finding.ok:
            show(f"         {finding.mend}")
    if not all(finding.ok for finding in findings):
        raise WorkError("Something is missing; the lines above say how to mend it.")
