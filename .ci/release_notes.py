"""Print what CHANGELOG.md says of the version in pyproject.toml; `release_notes.py TAG` also demands that tag for it.

Exits with a reason where the tag and the version differ, or where the version has no section with a date.
"""

import re
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]


def release_notes(changelog: str, version: str) -> str:
    """The text below `## [version] - YYYY-MM-DD`, up to the next version or the links at the end."""
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}\n"
    section = re.search(heading + r"(.*?)(?=^## |^\[.+\]: |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if section is None or not section.group(1).strip():
        sys.exit(f"CHANGELOG.md says nothing of {version}; add a section '## [{version}] - YYYY-MM-DD'")
    return section.group(1).strip()


if __name__ == "__main__":
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if sys.argv[1:] not in ([], [f"v{version}"]):
        sys.exit(f"the tag is {sys.argv[1]} and pyproject.toml says {version}; tag the release as v{version}")
    print(release_notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version))
