"""What lets work last for hours: a journal of finished steps, a clean stop, and processes that share the work."""

from allocator.running.fingerprint import RunFingerprint, versions
from allocator.running.journal import Journal
from allocator.running.stopping import finish_step_on_sigterm, stop_requested
from allocator.running.team import ALONE, Team, team_from_environment
from allocator.running.work_folder import Resume, WorkFolder

__all__ = [
    "ALONE",
    "Journal",
    "Resume",
    "RunFingerprint",
    "Team",
    "WorkFolder",
    "finish_step_on_sigterm",
    "stop_requested",
    "team_from_environment",
    "versions",
]
