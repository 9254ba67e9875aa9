"""One run of learning, by any version of allocator, in a process of its own: CPU seconds of each step, as JSON."""

import argparse
import json
import resource
import sys
import time
from functools import partial
from pathlib import Path

START = time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--whole-blocks", action="store_true", help="run the whole block for each candidate")
    args = parser.parse_args()

    from allocator.pipeline import CandidateSettings, learn
    from allocator.run.progress import Progress
    from allocator.score import LearningSettings, task

    if args.whole_blocks:
        task.measure_swaps = partial(task.measure_swaps, whole_blocks=True)

    class Steps(Progress):
        """CPU seconds by step; of a step that comes twice (gradients of one probe, and of all), twice."""

        def __init__(self) -> None:
            self.seconds: list[tuple[str, float]] = []
            self._step, self._since = "imports", START

        def begin(self, step: str, total: float = 1, unit: str = "") -> None:
            now = time.process_time()
            self.seconds.append((self._step, round(now - self._since, 2)))
            self._step, self._since = step, now

    steps = Steps()
    candidates = CandidateSettings(
        group_size=64, sequences=args.sequences, sequence_length=args.length, calibration=[args.model / "text.txt"]
    )
    scores = learn(args.model, args.out, candidates, LearningSettings(), steps).scores
    steps.begin("end")
    found = {
        "steps": steps.seconds,
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "scores": {name: [c.score for c in module.candidates] for name, module in scores.modules.items()},
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
