"""Known vulnerabilities of the packages that the images install: `make audit`, or

    python3 deploy/audit.py [--service osv] [LOCK ...]

Runs pip-audit in an environment of its own, over sidecar.lock and object-storage.lock unless others are named. It asks
PyPI (or osv.dev) for advisories, so it needs a network. Exit status: 0 nothing known, 1 vulnerabilities, 2 not audited.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
DEFAULT = [REQUIREMENTS / "sidecar.lock", REQUIREMENTS / "object-storage.lock"]
PIP_AUDIT = "pip-audit==2.10.1"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("locks", nargs="*", type=Path, default=DEFAULT, metavar="LOCK")
    parser.add_argument("--service", choices=["pypi", "osv"], default="pypi")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        installed = subprocess.run([python, "-m", "pip", "install", "-qq", PIP_AUDIT], check=False)
        if installed.returncode:
            return _not_audited(f"{PIP_AUDIT} could not be installed")
        command = [python, "-m", "pip_audit", "-s", args.service, "-f", "json", "--progress-spinner", "off"]
        command += ["--no-deps", "--disable-pip"]
        for lock in args.locks:
            command += ["-r", str(lock)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return _not_audited(done.stderr.strip().rpartition("\n")[2])
    skipped = [f"{p['name']}: {p['skip_reason']}" for p in packages if "skip_reason" in p]
    if len(skipped) == len(packages):
        return _not_audited(f"no advisories of any package; is the network closed? First: {skipped[0]}")
    found = [(p, v) for p in packages for v in p.get("vulns", ())]
    for package, known in found:
        fixed = ", ".join(known["fix_versions"]) or "no release yet"
        print(f"{package['name']} {package['version']}: {known['id']}, fixed in {fixed}")
    for reason in skipped:
        print(f"not audited: {reason}")
    print(f"{len(packages) - len(skipped)} packages audited, {len(found)} known vulnerabilities")
    return 1 if found else 0


def _not_audited(reason: str) -> int:
    print(f"audit: nothing was audited: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
