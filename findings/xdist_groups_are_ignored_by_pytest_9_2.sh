#!/usr/bin/env bash
# Guess: under `pytest -n 2 --dist loadgroup` tests with the same `@pytest.mark.xdist_group("name")` run in one process, as
# pytest-xdist documents it; so a session fixture that only they use is made once.
# Seen (2026-11-30, pytest-xdist 3.8.0 from the index, Linux, 2 cores, Python 3.11): so it is with pytest 9.0.2. With pytest 9.2.0 the
# marks have no effect and nothing says so: the tests of one group run in both processes. pytest-xdist puts the group's name into
# the private `_nodeid` of a test, which pytest 9.2.0 no longer reads when it is asked for `nodeid`.
# Output: "pytest 9.0.2: 1 process(es) for one group", "pytest 9.2.0: 2 process(es) for one group".
# Exit code 0 while that is so; 1 if pytest 9.2.0 keeps the group together, or 9.0.2 does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/tests"
cat > "$work/tests/test_group.py" <<'PYTHON'
import os
import time
from pathlib import Path

import pytest


@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("number", range(20))
def test_which_process(number):
    time.sleep(0.02)
    (Path(os.environ["SEEN"]) / os.environ["PYTEST_XDIST_WORKER"]).touch()
PYTHON
processes() {
  python3 -m venv "$work/venv-$1"
  "$work/venv-$1/bin/python" -m pip install --quiet --disable-pip-version-check "pytest==$1" pytest-xdist==3.8.0 execnet==2.1.2
  mkdir "$work/seen-$1"
  (cd "$work/tests" && SEEN="$work/seen-$1" "$work/venv-$1/bin/python" -m pytest -q -p no:cacheprovider -n 2 --dist loadgroup > "$work/log-$1")
  find "$work/seen-$1" -type f | wc -l
}
old=$(processes 9.0.2)
new=$(processes 9.2.0)
echo "pytest 9.0.2: $old process(es) for one group"
echo "pytest 9.2.0: $new process(es) for one group"
[ "$old" = 1 ] && [ "$new" = 2 ]
