"""What a model is called in banks, scores and stores."""

from pathlib import Path

from huggingface_hub.file_download import repo_folder_name

from allocator.pipeline.model_folder import name_of_model


def test_a_model_of_the_hub_is_called_by_its_id_and_not_by_its_commit(tmp_path: Path) -> None:
    cached = tmp_path / repo_folder_name(repo_id="Qwen/Qwen3-32B", repo_type="model")
    snapshot = cached / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    assert name_of_model(snapshot) == "Qwen3-32B"


def test_a_folder_is_called_by_its_name_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "Qwen3-8B").mkdir()
    (tmp_path / "model").symlink_to("Qwen3-8B")
    assert name_of_model(tmp_path / "model") == "Qwen3-8B"
