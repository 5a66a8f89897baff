"""Fails where a requirement names a lower version than the one installed: that version is promised and was not tried.

Run by `make test-oldest` in its environment.
"""

import sys
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

problems = []
for path in map(Path, sys.argv[1:]):
    for line in filter(None, (line.partition("#")[0].strip() for line in path.read_text().splitlines())):
        requirement = Requirement(line)
        (lowest,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
        installed = Version(version(requirement.name)).public  # without +cu130
        if Version(installed) != Version(lowest):
            problems.append(f"{path} promises {requirement.name} {lowest}; the lowest that installs is {installed}")
sys.exit("\n".join(problems) or None)
