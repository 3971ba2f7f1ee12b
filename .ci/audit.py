"""Print known vulnerabilities of the installed packages: python .ci/audit.py REPORT LOG, both written by pip-audit.

pip-audit reports success if its index knows none of the packages, so the number of known ones is printed. Nothing fails
here, because a new vulnerability of a dependency is not caused by the change under test.
"""

import json
import sys
from pathlib import Path


def main(report: Path, log: Path) -> None:
    """Print how many packages the index knows, and their vulnerabilities."""
    try:
        packages = json.loads(report.read_text(encoding="utf-8"))["dependencies"]
    except (OSError, ValueError, KeyError):
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        say(f"pip-audit: no answer ({(lines or ['empty log'])[-1][:200]})")
        return
    known = [package for package in packages if "vulns" in package]
    holes = [(package, hole) for package in known for hole in package["vulns"]]
    say(f"pip-audit: {len(known)} of {len(packages)} packages are known to the index, {len(holes)} vulnerabilities")
    for package, hole in holes:
        fixed = ", ".join(hole["fix_versions"]) or "no release"
        say(f"  {package['name']} {package['version']}: {hole['id']}, fixed in {fixed}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
