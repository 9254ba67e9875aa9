"""What a store offers may keep a state of each sequence: the service plans it like the command line."""

from pathlib import Path

from allocator.plan import PlanRequest, find_gpu
from allocator.sidecar.planning import plan_entry
from tests.configs import config_of

from .scores import publish_scores, random_scores


def test_a_model_with_linear_attention_is_planned_with_its_states_in_a_line(tmp_path: Path) -> None:
    entry = publish_scores(tmp_path, "Qwen3.5-27B").model_copy(update={"config": config_of("qwen3.5-27b")})
    request = PlanRequest(max_model_len=32768, max_num_seqs=8)
    plan = plan_entry(entry, random_scores("Qwen3.5-27B"), find_gpu("l40s"), request)
    assert plan.line("recurrent state").nbytes == 8 * 3 * 2 * plan.kv_bytes_per_block
    assert plan.planned is not None
    assert plan.planned.sequences >= 8
