"""Projects that studies compare with, which nothing else of the repository needs."""

from typing import Sequence

from kd_mm.hosts.packages import installed


def need(study: str, packages: Sequence[str], mend: str) -> None:
    """Stop a study whose packages are not all installed.

    Args:
        study: its name, for the message.
        packages: names to import them by.
        mend: how to install them.

    Raises:
        SystemExit: one is missing; the message names it and the mend.
    """
    missing = [package for package in packages if not installed(package)]
    if missing:
        verb = 'is' if len(missing) == 1 else 'are'
        raise SystemExit(f'{study}: {", ".join(missing)} {verb} not installed. {mend}')
