"""Compares the tests that were skipped with the committed list: check_skips.py LIST REPORT.xml [REPORT.xml ...]

A test skipped without being listed has silently stopped testing; a listed one that now runs makes the list a lie.
Both end with status 1 and one line each, in the form in which the list wants it. So does a missing report.
Standard library only.
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def skipped_in(report: Path) -> set[str]:
    """Reads the skips of a JUnit report of pytest, as "test id<tab>reason"."""
    found = set()
    for case in ElementTree.parse(report).iter("testcase"):
        for skip in case.iter("skipped"):
            if skip.get("type") != "pytest.xfail":
                reason = " ".join((skip.get("message") or "").split())
                found.add(f"{case.get('classname')}::{case.get('name')}\t{reason}")
    return found


def listed_in(path: Path) -> set[str]:
    """Reads the committed list; blank lines and lines that start with # are comments."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def main(list_path: str, *reports: str) -> int:
    """Prints every difference and returns 1 if there is one."""
    missing = [report for report in reports if not Path(report).exists()]
    for report in missing:
        print(f"no test report {report}: pytest did not get to its end")
    skipped = set().union(*(skipped_in(Path(report)) for report in reports if report not in missing))
    listed = listed_in(Path(list_path))
    for line in sorted(skipped - listed):
        print(f"skipped, but not in {list_path}: {line}")
    for line in sorted(listed - skipped):
        print(f"in {list_path}, but not skipped: {line}")
    if not missing and skipped == listed:
        print(f"the skips are as listed: {len(skipped)}")
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
