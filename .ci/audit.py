"""Known vulnerabilities of what is installed: python .ci/audit.py REPORT LOG, both of pip-audit.

An index that knows none of the packages has no answer, which pip-audit itself words as if all were well. Nothing fails
here: what is published about a dependency today is no fault of today's change.
"""

import json
import sys
from pathlib import Path


def main(report: Path, log: Path) -> None:
    """Say how many packages were looked up, and what is known of them."""
    try:
        packages = json.loads(report.read_text(encoding="utf-8"))["dependencies"]
    except (OSError, ValueError, KeyError):
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        say(f"pip-audit: no answer ({(lines or ['nothing said'])[-1][:200]})")
        return
    known = [package for package in packages if "vulns" in package]
    holes = [(package, hole) for package in known for hole in package["vulns"]]
    say(f"pip-audit: {len(known)} of {len(packages)} packages are known to the index, {len(holes)} vulnerabilities")
    for package, hole in holes:
        mended = ", ".join(hole["fix_versions"]) or "no release"
        say(f"  {package['name']} {package['version']}: {hole['id']}, mended in {mended}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
