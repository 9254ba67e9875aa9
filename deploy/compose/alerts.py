"""Writes alerts.yaml, the chart's alerts for the one service of docker-compose: `python deploy/compose/alerts.py`."""

from pathlib import Path

import yaml

HERE = Path(__file__).parent
CHART = HERE.parents[1] / "helm" / "gamma"


def alerts() -> str:
    thresholds = yaml.safe_load((CHART / "values.yaml").read_text())["monitoring"]["rules"]
    text = (CHART / "files" / "alerts.yaml").read_text()
    for name, value in {
        "$NAMESPACE": "compose",
        "$SERVICES": "compose-gamma",
        "$ABSENT": 'absent(up{namespace="compose",service="compose-gamma",endpoint="http"})',
        "$FIRST_TOKEN_SECONDS": thresholds["firstTokenSeconds"],
        "$WAITING_REQUESTS": thresholds["waitingRequests"],
        "$HEADROOM_BYTES": thresholds["headroomBytes"],
    }.items():
        text = text.replace(name, str(value))
    return "# Made by alerts.py from the chart's alerts.\n" + text.partition("\n")[2].partition("\n")[2]


if __name__ == "__main__":
    (HERE / "alerts.yaml").write_text(alerts())
